"""Run: .venv/bin/python -m pytest tests/kernels/test_int4.py -q   (needs g++; no GPU)

Both forms of the product in the emulator: 4-bit codes as sm_80 and sm_89 multiply them, and unpacked for sm_90.
"""

import shutil

import pytest
import torch
from torch import Tensor

from bitdgdm.kernels.int4 import Int4Linear, int4_linear, pack, supports
from bitdgdm.kernels.reference_int4 import int4_linear as twin
from bitdgdm.kernels.reference_int4 import outliers, round_tokens
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.recipe_book import get_recipe
from tests.kernels.emulate import Emulator

EMULATED = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
BOTH = pytest.mark.parametrize("arch", ["89", "90a"])


def emulator(arch: str, shared_bytes: int = 101376) -> Emulator:
    native = {"NATIVE": int(arch == "89")}
    return Emulator({"int4": native, "int4_narrow": native, "int8_narrow": {"NATIVE": 0}}, arch=arch, shared_bytes=shared_bytes)


def inputs(rows: int, width: int) -> Tensor:
    """Random rows of all sizes; one of zeros, one with a huge entry, one that is constant."""
    g = torch.Generator().manual_seed(rows * 1000 + width)
    x = torch.randn(rows, width, generator=g) * torch.logspace(-20, 20, rows)[:, None]
    x[0] = 0
    x[rows // 2, 3] = 1e30
    x[rows - 1] = -2.5
    return x


def weights(out: int, width: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g, most = torch.Generator().manual_seed(out + width), 2 ** (bits - 1)
    codes = torch.randint(-most, most, (out, width), generator=g).to(torch.int8)
    codes[0] = -most
    return codes, torch.rand(out, generator=g) + 0.01, torch.randn(out, generator=g)


@EMULATED
@BOTH
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "out"), [(1, 64, 64), (7, 128, 64), (33, 256, 128), (70, 192, 64), (3, 80, 64), (37, 320, 128), (17, 2048, 64)]
)
def test_a_plain_product_is_its_twin_to_the_last_bit(arch: str, asymmetric: bool, rows: int, width: int, out: int) -> None:
    (codes, scale, bias), x = weights(out, width), inputs(rows, width)
    x = x.clamp(-1e18, 1e18)  # beyond it the products themselves overflow
    got = int4_linear(x, pack(codes, scale, bias, asymmetric=asymmetric), emulator(arch))
    assert torch.equal(got, twin(x, codes, scale, bias, asymmetric=asymmetric))


@EMULATED
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("act_bits", "weight_bits"), [(8, 8), (8, 4), (8, 3), (6, 6), (5, 8)])
@pytest.mark.parametrize(("rows", "width", "out"), [(7, 64, 128), (33, 128, 64), (18, 200, 64)])
def test_so_is_one_of_inputs_of_5_to_8_bit(
    asymmetric: bool, act_bits: int, weight_bits: int, rows: int, width: int, out: int
) -> None:
    (codes, scale, bias), x = weights(out, width, weight_bits), inputs(rows, width).clamp(-1e18, 1e18)
    packed = pack(codes, scale, bias, asymmetric=asymmetric, act_bits=act_bits, weight_bits=weight_bits)
    wanted = twin(x, codes, scale, bias, asymmetric=asymmetric, act_bits=act_bits)
    assert torch.equal(int4_linear(x, packed, emulator("90a")), wanted)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_twin_is_quant_linear_to_the_last_bit(asymmetric: bool, bits: int) -> None:
    recipe, x = get_recipe(f"rtn-w{bits}a{bits}"), inputs(33, 96).clamp(-1e18, 1e18)
    recipe = recipe.changed(act_asymmetric=asymmetric)
    torch.manual_seed(1)
    parts, bias = decompose(torch.randn(48, 96), recipe)[0], torch.randn(48)
    layer = QuantLinear.from_parts(parts, bias, recipe)
    assert layer.codes is not None and layer.scale is not None
    codes = layer.codes.to(torch.int8)
    assert torch.equal(twin(x, codes, layer.scale, bias, asymmetric=asymmetric, act_bits=bits), layer(x))
    q, _ = round_tokens(x, asymmetric, bits)
    assert (q.amax(1) - q.amin(1)).max() == 2**bits - (1 if asymmetric else 2)


def method_layer(width: int, out: int) -> tuple[QuantLinear, Int4Linear, dict[str, object]]:
    """A Linear with outlying inputs and weights by bitdgdm-w4a4-r16-s1: QuantLinear, packed, what the twin wants."""
    torch.manual_seed(width)
    weight = torch.randn(out, width) @ torch.diag(1 + 4 * torch.rand(width)) / width**0.5
    recipe, bias = get_recipe("bitdgdm-w4a4-r16-s1"), torch.randn(out)
    parts = decompose(weight, recipe)[0]
    layer = QuantLinear.from_parts(parts, bias, recipe)
    up, down = parts.proj_up.float(), parts.proj_down.float()  # type: ignore[union-attr]
    if parts.proj_up_scale is not None:
        up, down = up * parts.proj_up_scale.float(), down * parts.proj_down_scale.float()  # type: ignore[union-attr]
    assert layer.side is not None and layer.codes is not None and layer.scale is not None
    sparse = torch.zeros(out, width)
    sparse.view(-1)[parts.sparse_index.long()] = parts.sparse_value.float()  # type: ignore[union-attr]
    codes = layer.codes.to(torch.int8)
    packed = pack(codes, layer.scale, bias, asymmetric=True, sigma=3.0, up=up, down=down, sparse=sparse)
    return layer, packed, {"codes": codes, "scale": layer.scale, "bias": bias, "side": up @ down.T + sparse}


@EMULATED
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(64, 128), (128, 64), (256, 64), (1024, 64)])
def test_the_published_method_errs_at_most_twice_as_much_as_pytorch_with_its_branches_in_bf16(
    arch: str, dtype: torch.dtype, width: int, out: int
) -> None:
    layer, packed, parts = method_layer(width, out)
    x = (torch.randn(37, width) * (1 + 20 * (torch.rand(37, width) < 0.02))).to(dtype)
    assert outliers(x.float(), 3.0, None).any(1).sum() > 10
    exact = twin(x.float(), **parts, asymmetric=True, sigma=3.0, dtype=torch.float64)  # type: ignore[arg-type]
    low = twin(x.float(), **parts, asymmetric=True, sigma=3.0, dtype=torch.bfloat16)  # type: ignore[arg-type]
    got = int4_linear(x, packed, emulator(arch))
    assert got.dtype == dtype
    assert (got.double() - exact).norm() <= 2 * (low.double() - exact).norm()
    assert (layer(x).double() - exact).norm() <= (2e-6 if dtype == torch.float32 else 4e-3) * exact.norm()
    assert (got.double() - exact).norm() <= 4e-3 * exact.norm()


@EMULATED
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_branches_of_8_bit_err_at_most_twice_as_much_as_pytorch_in_bf16(width: int, weight_bits: int) -> None:
    (codes, scale, bias), g = weights(64, width, weight_bits), torch.Generator().manual_seed(width)
    scale, up, down = scale / 2**weight_bits, torch.randn(64, 8, generator=g), torch.randn(width, 8, generator=g)
    x = torch.randn(37, width, generator=g) * (1 + 20 * (torch.rand(37, width, generator=g) < 0.02))
    packed = pack(
        codes, scale, bias, asymmetric=True, sigma=3.0, up=up, down=down, act_bits=8, weight_bits=weight_bits
    )
    given = {"asymmetric": True, "sigma": 3.0, "act_bits": 8, "side": up.bfloat16().float() @ down.bfloat16().float().T}
    exact, low = (twin(x, codes, scale, bias, **given, dtype=kind) for kind in (torch.float64, torch.bfloat16))  # type: ignore[arg-type]
    got = int4_linear(x, packed, emulator("90a"))
    assert (got.double() - exact).norm() <= 2 * (low.double() - exact).norm()
    assert (got.double() - exact).norm() <= 4e-3 * exact.norm()


@EMULATED
@BOTH
def test_limits_per_channel_keep_their_outliers_out_of_the_codes(arch: str) -> None:
    (codes, scale, bias), x = weights(64, 128), torch.randn(20, 128)
    tau = torch.full((128,), 2.0)
    tau[5] = 0.1
    x = x.bfloat16().float()
    got = int4_linear(x, pack(codes, scale, bias, tau=tau), emulator(arch))
    exact = twin(x, codes, scale, bias, tau=tau, dtype=torch.float64)
    assert (got.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@EMULATED
@BOTH
def test_a_row_depends_on_itself_alone(arch: str) -> None:
    _, packed, _ = method_layer(64, 128)
    x = torch.randn(70, 64)
    x[11, 4] = 100
    whole = int4_linear(x, packed, emulator(arch))
    pick = torch.tensor([40, 11, 3])
    assert torch.equal(int4_linear(x[pick], packed, emulator(arch)), whole[pick])
    broken = x.clone()
    broken[11, 9], broken[40, 1] = float("nan"), float("inf")
    got = int4_linear(broken, packed, emulator(arch))
    assert not got[[11, 40]].isfinite().any()
    others = [i for i in range(70) if i not in (11, 40)]
    assert torch.equal(got[others], whole[others])
    assert int4_linear(x[:0], packed, emulator(arch)).shape == (0, 128)
    assert torch.equal(int4_linear(x.view(7, 10, 64), packed, emulator(arch)).view(70, 128), whole)


@EMULATED
def test_codes_that_are_nothing_beside_their_branches_are_left_out() -> None:
    codes, scale, bias = weights(64, 128)
    up, down = torch.randn(64, 4).bfloat16(), torch.randn(128, 4).bfloat16()
    scale[3] = 1e-38  # of L R^T divided by it nothing finite would be left
    got = int4_linear(x := torch.randn(20, 128), pack(codes, scale, bias, up=up, down=down), emulator("90a"))
    exact = twin(x, codes, scale, bias, side=up.float() @ down.float().T, dtype=torch.float64)
    assert got.isfinite().all() and (got.double() - exact).norm() <= 4e-3 * exact.norm()


@EMULATED
def test_both_forms_give_the_same_bytes_with_every_branch() -> None:
    _, packed, _ = method_layer(256, 64)
    x = torch.randn(40, 256) * (1 + 20 * (torch.rand(40, 256) < 0.02))
    assert torch.equal(int4_linear(x, packed, emulator("89")), int4_linear(x, packed, emulator("90a")))


def test_what_it_cannot_take_is_refused_with_the_reason() -> None:
    assert supports(256, 2048, rank=16, branches=True, arch="89") == (True, "")
    assert "multiples of 64 output channels, not 12" in supports(12, 64)[1]
    assert "rank 32 at most of more than 256 channels, not 48" in supports(64, 320, rank=48)[1]
    assert supports(64, 256, rank=48) == (True, "")
    assert supports(64, 256, act_bits=8, weight_bits=3) == (True, "")
    assert "not 8 and 4" in supports(64, 64, weight_bits=8)[1]
    assert "8 bit up to 256 channels, not 320" in supports(64, 320, act_bits=8)[1]
    assert "sm_75" in supports(64, 64, arch="75")[1]
    ok, reason = supports(64, 4096, branches=True, arch="89")
    assert not ok and "bytes of shared memory for 4096 input channels, sm_89 has 101376" in reason
    codes, scale, _ = weights(64, 64)
    with pytest.raises(ValueError, match=r"float32 or bf16 \[\.\.\., 64\], not torch\.float16 \[2, 64\]"):
        int4_linear(torch.zeros(2, 64, dtype=torch.float16), pack(codes, scale), emulator("89"))
    with pytest.raises(ValueError, match="sm_89 has 512"):
        int4_linear(torch.zeros(2, 320), pack(*weights(64, 320)[:2]), emulator("89", shared_bytes=512))
