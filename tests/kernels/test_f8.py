"""Run: .venv/bin/python -m pytest tests/kernels/test_f8.py -q   (needs g++; no GPU)

The kernels of 8-bit floats in the emulator, against the twins: kernel by kernel on what the kernels themselves were given,
so that one rounding on an edge doesn't hide the next error, and the whole network.
"""

import math
import shutil
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bitdgdm.kernels import reference as twin
from bitdgdm.kernels.denoise import ATTEND_F8_SHARED, Denoiser, Noise
from bitdgdm.kernels.network import LOG2E
from bitdgdm.kernels.network_f8 import VALUES, Codes, _half_weight, cast, overflow, prepare_f8
from bitdgdm.kernels.pack import from_tiles, pack_pairs
from bitdgdm.kernels.step_graph import denoise
from bitdgdm.models.digress import quantizable
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.features import network_input
from bitdgdm.quant.activations import quantize_fp8
from tests.kernels.conftest import Case, make_case
from tests.kernels.emulate import Emulator
from tests.kernels.test_denoise import SEED, TIMES, assert_no_trace, noise_of, relative

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")


def codes_of(case: Case) -> dict[str, Codes]:
    found = {}
    for name in quantizable(case.config):
        w = case.weights[f"{name}.weight"].float()
        scale = (w.abs().amax(1) / 448).bfloat16().float()
        found[name] = Codes(cast(w / scale[:, None]), scale)
    return found


def twin_weights(case: Case) -> dict[str, Tensor]:
    w = dict(case.weights)
    for name, c in codes_of(case).items():
        w[f"{name}.codes"], w[f"{name}.scale"] = c.value, c.scale
    return w


def batch_of(case: Case, pick: list[int] | None = None, step: int = 1, multiprocessors: int = 2) -> Denoiser:
    keep = torch.tensor(pick if pick is not None else range(len(case.n)))
    network = prepare_f8(case.weights, codes_of(case), case.shape, torch.device("cpu"))
    noise = noise_of(case)
    noise = Noise(noise.times.to(torch.int32), noise.tables_x, noise.tables_e)
    launcher = Emulator(case.shape.defines, multiprocessors=multiprocessors)
    batch = Denoiser(network, noise, case.n[keep], keep * 10**12 + 3, SEED, launcher)
    batch.x.copy_(case.x[keep])
    batch.e.copy_(case.e[keep])
    batch.step.fill_(step)
    return batch


@dataclass
class Seen:
    """Buffers of a batch as dense float64 arrays, 0 on padding."""

    batch: Denoiser

    @property
    def place(self) -> tuple[Tensor, Tensor]:
        at = self.batch.layout
        graph, _, _, i = at.rows[: at.n_rows].long().unbind(1)
        return graph, i

    def rows(self, values: Tensor) -> Tensor:
        """values: [rows, channels] -> [B, n_pad, channels]."""
        at = self.batch.layout
        out = torch.zeros(at.count, at.n_pad, values.shape[1], dtype=torch.float64)
        out[self.place] = values[: at.n_rows].double()
        return out

    def tiles(self, t: Tensor) -> Tensor:
        return self.rows(from_tiles(t))

    def pairs(self, t: Tensor) -> Tensor:
        at = self.batch.layout
        n, j, row = at.rows[: at.n_rows, 2].long(), torch.arange(at.n_pad), torch.arange(at.n_rows)
        m_tile = (at.tile_start.long()[row >> 4][:, None] + j).clamp(max=at.m_tiles - 1)
        values = from_tiles(t).view(at.m_tiles, 16, -1)[m_tile, (row & 15)[:, None]].double()
        out = torch.zeros(at.count, at.n_pad, at.n_pad, values.shape[-1], dtype=torch.float64)
        out[self.place] = torch.where((j < n[:, None])[..., None], values, 0.0)
        return out

    def queries(self, case: Case) -> Tensor:
        """Without what is folded into them: log2(e) / sqrt(df) and the scale of e_mul."""
        left = _half_weight(codes_of(case)["tf_layers.0.self_attn.e_mul"])[1]
        return self.tiles(self.batch.q) / (left.double() * LOG2E / math.sqrt(256 // case.shape.heads))

    def keys_values(self) -> tuple[Tensor, Tensor]:
        at = self.batch.layout
        both = self.batch.kv[: at.tiles * 16].view(-1, 16, 4, 2, 2, 2)  # block, lane, k or v, n-tile, channel
        k, v = (both[:, :, :, s].permute(0, 1, 3, 2, 4).reshape(-1, 256) for s in (0, 1))
        return self.rows(k), self.rows(v) / VALUES

    def gathered(self) -> Tensor:
        t = self.batch.gathered.view(torch.uint8).view(torch.float8_e4m3fn).float()
        t = t.view(-1, 8, 8, 4, 2, 2, 2, 2)  # tile, slab, row, lane, half, high row, n-tile, channel
        return self.rows(t.permute(0, 5, 2, 1, 4, 6, 3, 7).reshape(-1, 256))

    def film(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and summands [B, 256]."""
        both = t[: self.batch.layout.count].double().view(-1, 16, 4, 2, 2, 2)
        mul, add = (both[:, :, :, s].permute(0, 1, 3, 2, 4).reshape(-1, 256) for s in (0, 1))
        return mul, add


def before_the_net(batch: Denoiser, i: int) -> Tensor:
    """What edge_attend of an even layer stores in its last form, without the feed-forward net of E."""
    p, at, out = batch.network.layers[i], batch.layout, torch.full_like(batch.E, float("nan"))
    args = (
        batch.E, out, batch.q, batch.kv, batch.film_e, batch.film_x, torch.empty_like(batch.gathered), at.tile_start, at.rows,
        at.block_tile, p.w_mul, p.w_add, p.score_bias, p.w_e_out, p.e_out_vec, None, None,
    )  # fmt: skip
    batch.launcher.launch("edge_f8", "edge_attend", len(at.block_tile) - 1, 640, ATTEND_F8_SHARED, args)
    return out


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    x, e = case.one_hot()
    return network_input(x, e, torch.full((len(x),), TIMES[1] / 500), case.mask, case.config)


@pytest.mark.parametrize("name", ["qm9_case", "moses_case"])
def test_each_kernel_computes_its_twin_on_what_it_was_given(name: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    w, batch = twin_weights(case), batch_of(case)
    at, seen, mask, heads = batch.layout, Seen(batch), case.mask, case.shape.heads
    pair = twin.pairs(mask)
    batch.features()
    batch.inputs()
    x, e, y = seen.tiles(batch.X), seen.pairs(batch.E), from_tiles(batch.y)[: at.count].double()
    assert relative(x, twin.mlp(w, "mlp_in_X.0", "mlp_in_X.2", inputs(case)[0]).relu() * mask[..., None]) < 5e-3
    q, (k, v) = seen.queries(case), seen.keys_values()
    for ours, want in zip((q, k, v), twin.queries(w, 0, x), strict=True):
        assert relative(ours, want * mask[..., None]) < 1e-2  # what is cast there is X before it is rounded to f16
    film = twin.film(w, 0, y)
    for ours, mul, add in ((batch.film_e, film.e_mul, film.e_add), (batch.film_x, film.x_mul, film.x_add)):
        factors, summands = seen.film(ours)
        assert relative(factors / factors[:1, :1], mul / mul[:1, :1]) < 2e-3 and relative(summands, add) < 2e-3

    halfway = before_the_net(batch, 0)
    batch.layer(0)
    e1, gathered = twin.edge_attend(w, 0, heads, e, q, k, v, film, mask)
    ours = seen.gathered()
    assert relative(ours, cast(gathered) * mask[..., None]) < 1e-2  # a rounding on an edge is 6 %
    assert relative(seen.pairs(halfway), e1 * pair) < 5e-3
    assert relative(seen.pairs(batch.E1), twin.edge_ffn(w, 0, seen.pairs(halfway)) * pair) < 1e-3
    assert relative(seen.tiles(batch.X), twin.node_update(w, 0, ours, x, mask) * mask[..., None]) < 2e-3
    pooled = from_tiles(batch.z)[: at.count].double()
    want = torch.cat((twin.pool(x), twin.pool(e.flatten(1, 2))), dim=1)
    assert relative(pooled, cast(want).double()) < 1e-2
    new_y, _ = twin.graph_mid(w, 0, pooled[:, :1024], pooled[:, 1024:], y)
    assert relative(from_tiles(batch.y)[: at.count], new_y) < 1.5e-2


@pytest.mark.parametrize("name", ["qm9_case", "moses_case"])
def test_the_network_is_nearer_to_its_twin_than_the_twin_to_full_precision(
    name: str, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(name)
    batch = batch_of(case)
    batch.forward()
    rows, one_hot, y = (t.double() for t in inputs(case))
    one_hot = one_hot[..., : case.shape.classes_e]
    want = twin.forward(twin_weights(case), case.shape, rows, one_hot, y, case.mask)
    full = twin.forward(case.weights, case.shape, rows, one_hot, y, case.mask)
    for ours, quantized, exact in zip(batch.logits(), want, full, strict=True):
        assert relative(ours, quantized) <= relative(quantized, exact)


def test_a_graph_does_not_depend_on_its_companions_or_on_the_machine(qm9_case: Case) -> None:
    together = batch_of(qm9_case, step=0)
    denoise(together, 2)
    for pick, multiprocessors in (([6, 2, 0], 2), ([3, 1], 3)):
        apart = batch_of(qm9_case, pick, step=0, multiprocessors=multiprocessors)
        denoise(apart, 2)
        assert torch.equal(apart.x, together.x[pick])
        assert torch.equal(apart.e, together.e[pick])


def test_buffers_that_share_memory_leave_no_trace() -> None:
    assert_no_trace(batch_of)


def test_scores_beyond_the_range_of_f16_weights_are_gathered_all_the_same() -> None:
    case = make_case(QM9_NO_H, [9, 4, 1], scale=400.0)
    w, batch = twin_weights(case), batch_of(case)
    seen = Seen(batch)
    batch.features()
    batch.inputs()
    e, (k, v) = seen.pairs(batch.E), seen.keys_values()
    film = twin.film(w, 0, from_tiles(batch.y)[:3].double())
    q = seen.queries(case)
    weights = (q[:, :, None] * k[:, None]).abs().max() * LOG2E / math.sqrt(256 // case.shape.heads)
    assert weights > 40  # powers of two; else this tests nothing
    batch.layer(0)
    _, gathered = twin.edge_attend(w, 0, case.shape.heads, e, q, k, v, film, case.mask)
    assert seen.gathered().isfinite().all()
    assert relative(seen.gathered(), cast(gathered) * case.mask[..., None]) < 2e-2


def test_codes_whose_sums_could_overflow_are_refused(qm9_case: Case) -> None:
    codes = codes_of(qm9_case)
    assert overflow(qm9_case.weights, codes, qm9_case.shape) == ""
    weights = dict(qm9_case.weights) | {"tf_layers.0.normE2.weight": torch.full((64,), 1e4)}
    assert "tf_layers.1.self_attn.e_" in overflow(weights, codes, qm9_case.shape)


def test_the_cast_is_that_of_quant_linear() -> None:
    x = torch.cat((torch.randn(1000) * 100, torch.tensor([0.0, 447.9, 448.1, 1e30, -1e30, 2**-9, 2**-10])))
    assert torch.equal(cast(x), quantize_fp8(x[None], torch.ones(1))[0][0])


def test_two_blocks_of_bytes_lie_side_by_side_in_a_lane() -> None:
    blocks = torch.arange(3 * 4 * 32 * 8).view(3, 4, 32, 8)
    packed = pack_pairs(blocks)
    assert packed.shape == (3, 2, 32, 2, 8)
    assert torch.equal(packed[2, 1, 17, 0], blocks[2, 2, 17]) and torch.equal(packed[2, 1, 17, 1], blocks[2, 3, 17])
