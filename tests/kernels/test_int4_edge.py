"""Run: .venv/bin/python -m pytest tests/kernels/test_int4_edge.py -q   (needs g++; no GPU)"""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdgdm.kernels.int4 import pack
from bitdgdm.kernels.int4_edge import SHAPES, Int4Edge, int4_edge, pack_edge, supports
from bitdgdm.kernels.reference_int4 import edge as twin
from tests.kernels.emulate import Emulator

EMULATED = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")


def emulator(arch: str) -> Emulator:
    return Emulator({"int4_edge": {"NATIVE": int(arch == "89")}, "int8_edge": {"NATIVE": 0}}, arch=arch, shared_bytes=101376)


def layer(
    asymmetric: bool, branches: bool, seed: int = 1, device: str = "cpu", bits: tuple[int, int] = (4, 4)
) -> tuple[Int4Edge, list[dict[str, Any]], list[Tensor]]:
    """Packed, and what the twin wants: the five Linears and the LayerNorms' vectors. bits: of weights, of inputs."""
    g = torch.Generator().manual_seed(seed)
    packed, linears = [], []
    for i, (out, width) in enumerate(SHAPES):
        most = 2 ** (bits[0] - 1)
        codes = torch.randint(-most, most, (out, width), generator=g).to(torch.int8)
        scale, bias = (torch.rand(out, generator=g) + 0.5) / (0.75 * most * width**0.5), torch.randn(out, generator=g) / 4
        given: dict[str, Any] = {"codes": codes, "scale": scale, "bias": bias, "asymmetric": asymmetric, "act_bits": bits[1]}
        parts: dict[str, Any] = {}
        if branches:
            given |= {"tau": torch.full((width,), 1.7)} if i == 3 else {"sigma": 3.0 if i > 1 else 2.0}
            up, down = (torch.randn(rows, 16, generator=g).bfloat16() / 12 for rows in (out, width))
            sparse = torch.randn(out, width, generator=g) * (torch.rand(out, width, generator=g) < 0.02)
            parts = {"up": up, "down": down, "sparse": sparse.bfloat16()}
        packed.append(pack(**given, **parts, weight_bits=bits[0], device=device))
        side = parts["up"].float() @ parts["down"].float().T + parts["sparse"].float() if branches else None
        linears.append({**given, "side": side})
    norms = [torch.rand(64, generator=g) + 0.5 if i % 2 == 0 else torch.randn(64, generator=g) / 3 for i in range(4)]
    return pack_edge(packed, norms), linears, norms


def inputs(counts: list[int], n: int, seed: int = 2) -> tuple[Any, ...]:
    """Edges of LayerNorm's size, a few of them large; graphs of the given numbers of nodes."""
    g = torch.Generator().manual_seed(seed)
    b = len(counts)
    e = torch.randn(b, n, n, 64, generator=g) * (1 + 6 * (torch.rand(b, n, n, 64, generator=g) < 0.02))
    q, k, v = (torch.randn(b, n, 256, generator=g) for _ in range(3))
    film = torch.randn(b, 256, generator=g) / 3, torch.randn(b, 256, generator=g) / 3
    return e, q, k, v, film, torch.tensor(counts, dtype=torch.int32)


@EMULATED
@pytest.mark.parametrize("arch", ["89", "90a"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("counts", "n", "branches"), [([9, 5, 1], 9, True), ([9, 3], 9, False), ([27, 20], 27, True), ([2, 1], 2, True)])
def test_it_errs_at_most_twice_as_much_as_pytorch_in_bf16(
    arch: str, asymmetric: bool, counts: list[int], n: int, branches: bool
) -> None:
    packed, linears, norms = layer(asymmetric, branches)
    x = inputs(counts, n)
    got = int4_edge(*x, packed, emulator(arch))
    exact, low = (twin(*x, linears, norms, dtype=kind) for kind in (torch.float64, torch.bfloat16))
    for ours, right, theirs in zip(got, exact, low, strict=True):
        assert (ours.double() - right).norm() <= 2 * (theirs.double() - right).norm()
        assert (ours.double() - right).norm() <= 0.05 * right.norm()


@EMULATED
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (6, 6)])
@pytest.mark.parametrize(("asymmetric", "branches"), [(False, False), (True, True)])
def test_so_do_inputs_of_5_to_8_bit(asymmetric: bool, branches: bool, bits: tuple[int, int]) -> None:
    packed, linears, norms = layer(asymmetric, branches, bits=bits)
    x = inputs([9, 4, 7], 9)
    got = int4_edge(*x, packed, emulator("90a"))
    exact, low = (twin(*x, linears, norms, dtype=kind) for kind in (torch.float64, torch.bfloat16))
    for ours, right, theirs in zip(got, exact, low, strict=True):
        assert (ours.double() - right).norm() <= 2 * (theirs.double() - right).norm()
        assert (ours.double() - right).norm() <= 0.02 * right.norm()


@EMULATED
def test_both_forms_give_the_same_bytes_and_a_graph_depends_on_itself_alone() -> None:
    packed, _, _ = layer(True, True)
    counts = [9, 4, 7, 1, 9]
    x = inputs(counts, 9)
    whole = int4_edge(*x, packed, emulator("90a"))
    assert all(torch.equal(a, b) for a, b in zip(whole, int4_edge(*x, packed, emulator("89")), strict=True))
    pick = torch.tensor([3, 1])
    e, q, k, v, film, n = x
    e = e.clone()
    e[2, 1, 1, 5] = float("nan")
    some = int4_edge(e[pick], q[pick], k[pick], v[pick], (film[0][pick], film[1][pick]), n[pick], packed, emulator("90a"))
    assert all(torch.equal(a, b[pick]) for a, b in zip(some, whole, strict=True))
    broken = int4_edge(e, q, k, v, film, n, packed, emulator("90a"))
    assert not broken[0][2, 1].isfinite().all()
    assert all(torch.equal(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]]) for a, b in zip(broken, whole, strict=True))


@EMULATED
def test_a_graph_without_nodes_is_finite() -> None:
    packed, _, _ = layer(True, True)
    got, gathered = int4_edge(*inputs([0, 2], 9), packed, emulator("90a"))
    assert got.isfinite().all() and not gathered[0].any()


def test_what_it_cannot_take_is_refused_with_the_reason() -> None:
    packed, _, _ = layer(True, False)
    other, _, _ = layer(False, False)
    bytes8, _, _ = layer(True, False, bits=(8, 8))
    assert supports(packed.linears, 32, 101376) == (True, "")
    assert "32 nodes at most, not 33" in supports(packed.linears, 33, 101376)[1]
    assert "shared memory, the GPU has 65536" in supports(packed.linears, 9, 65536)[1]
    assert "from a zero point, or none" in supports([*packed.linears[:4], other.linears[4]], 9, 101376)[1]
    changed = replace(packed.linears[1], tau=torch.ones(64))
    assert "limits of outliers differ" in supports([packed.linears[0], changed, *packed.linears[2:]], 9, 101376)[1]
    assert "all to 4 bit, or none" in supports([*packed.linears[:4], bytes8.linears[4]], 9, 101376)[1]
    assert "not ((256, 64)," in supports(packed.linears[:2], 9, 101376)[1]
    e, q, k, v, film, n = inputs([9], 9)
    with pytest.raises(ValueError, match=r"takes torch\.float32 \[1, 9, 256\], not torch\.float32 \[1, 8, 256\]"):
        int4_edge(e, q[:, :8], k, v, film, n, packed, emulator("90a"))
