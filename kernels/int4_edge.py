"""The edges of one layer of a 4-bit network, as one launch (int4_edge.cu): attention, e_out, residual, feed-forward net.

Guarantees: integers of every product are exact; a graph's result depends on the graph alone; no tensor [B, n, n, 256] is
ever in memory.
Knows nothing of: recipes, nodes and y, which layer this is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdgdm.kernels.int4 import Int4Linear
from bitdgdm.kernels.launch import Launcher

MOST_NODES = 32  # edges of one node are rows of one warp
SHAPES = ((256, 64), (256, 64), (64, 256), (128, 64), (64, 128))  # [out, in] of e_mul, e_add, e_out, linE1, linE2
_WARPS, _WARP_BYTES = 4, 16 * (8 * 4 * 32 + 256 + 32 * 36 // 4)  # see int4_edge.cu


@dataclass(frozen=True)
class Int4Edge:
    """The Linears of a layer's edges, packed, and what the kernel reads of them: `table` is its Linear structs."""

    linears: tuple[Int4Linear, ...]
    table: Tensor
    norms: Tensor
    asymmetric: bool


def supports(linears: Sequence[Int4Linear], n: int, shared_bytes: int) -> tuple[bool, str]:
    """Whether the kernel takes these five Linears, graphs of `n` nodes and such a GPU, and why not."""
    found = tuple((w.out_features, w.in_features) for w in linears)
    if found != SHAPES:
        return False, f"int4_edge takes Linears of {SHAPES}, not {found}"
    if len({(w.asymmetric, w.act_bits > 4) for w in linears}) > 1:
        return False, "int4_edge takes Linears whose inputs are all rounded from a zero point, or none, and all to 4 bit, or none"
    if not all(_equal(getattr(linears[0], kind), getattr(linears[1], kind)) for kind in ("tau", "factor")):
        return False, "int4_edge rounds the input of e_mul and e_add once, and their limits of outliers differ"
    if not 1 <= n <= MOST_NODES:
        return False, f"int4_edge takes graphs of {MOST_NODES} nodes at most, not {n}"
    if shared_bytes < _WARPS * _WARP_BYTES:
        return False, f"int4_edge needs {_WARPS * _WARP_BYTES} bytes of shared memory, the GPU has {shared_bytes}"
    return True, ""


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def pack_edge(linears: Sequence[Int4Linear], norms: Sequence[Tensor]) -> Int4Edge:
    """linears: e_mul, e_add, e_out, linE1, linE2, which `supports` took, on their device; norms: gamma, beta [64] of normE1,
    then of normE2.
    """

    def at(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    table = [[*map(at, (w.words, w.vec, w.row_sums, w.side)), int(w.wide), at(w.tau), at(w.factor), w.top] for w in linears]
    device = linears[0].words.device
    vectors = torch.stack([v.detach().float() for v in norms]).to(device)
    return Int4Edge(tuple(linears), torch.tensor(table, device=device), vectors, linears[0].asymmetric)


def int4_edge(
    e: Tensor, q: Tensor, k: Tensor, v: Tensor, film: tuple[Tensor, Tensor], counts: Tensor, layer: Int4Edge, launcher: Launcher
) -> tuple[Tensor, Tensor]:
    """The layer's new edges float32[B, n, n, 64] and what attention gathers for the nodes float32[B, n, 256].

    e: float32[B, n, n, 64]; q (times 1 / sqrt(df)), k, v: float32[B, n, 256]; film: y_e_mul(y), y_e_add(y)
    float32[B, 256]; counts: int32[B], how many nodes there are, the first ones.
    """  # fmt: skip
    b, n = e.shape[:2]
    inputs = [t.contiguous() for t in (e, q, k, v, *film, counts)]
    for t, shape in zip(inputs, [(b, n, n, 64), *[(b, n, 256)] * 3, *[(b, 256)] * 2, (b,)], strict=True):
        wanted = torch.int32 if len(shape) == 1 else torch.float32
        if t.shape != shape or t.dtype != wanted:
            raise ValueError(f"int4_edge takes {wanted} {list(shape)}, not {t.dtype} {list(t.shape)}")
    if not 1 <= n <= MOST_NODES:
        raise ValueError(f"int4_edge takes graphs of {MOST_NODES} nodes at most, not {n}")
    out, gathered = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
    if b:
        per_graph = -(-n // (MOST_NODES // n))
        launcher.launch(
            f"{layer.linears[0].kind}_edge", "int4_edge" + "_asymmetric" * layer.asymmetric, -(-b * per_graph // _WARPS), 32 * _WARPS,
            _WARPS * _WARP_BYTES,
            (inputs[0], out, *inputs[1:], gathered, layer.table, layer.norms, b, n),
        )  # fmt: skip
    return out, gathered
