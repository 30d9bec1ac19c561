"""The features of graphs as one launch (features.cu), for our kernels and for a network in PyTorch.

Guarantees: a graph's features depend on the graph alone.
Knows nothing of: networks, noise, the time.
"""

import torch
from torch import Tensor

from bitdgdm.kernels.launch import Launcher
from bitdgdm.kernels.network import Shape

MOST_NODES = 64  # neighbours are bits of one word
_NODE, _TOTAL = 80, 40  # bytes of the structs of features.cu


def features_shared(n_pad: int) -> tuple[int, int]:
    """Warps a block and bytes a block."""
    m = n_pad + n_pad % 2
    graph = m * (m + 1) * 8 + m * _NODE + m * 8 + _TOTAL
    warp = 32 // min(32, m) * graph
    warps = max(1, min(4, 90_000 // warp))
    return warps, warps * warp


def queue_features(
    launcher: Launcher, shape: Shape, x: Tensor, e: Tensor, graphs: Tensor, times: Tensor, step: Tensor, table: Tensor,
    rows: Tensor, graph_rows: Tensor, plain_x: Tensor | None = None, plain_y: Tensor | None = None,
) -> None:  # fmt: skip
    """Queue the kernel. The tensors: see features.cu."""
    warps, shared = features_shared(shape.n_pad)
    per_block = warps * (32 // min(32, shape.n_pad + shape.n_pad % 2))
    launcher.launch(
        "features", "features", -(-len(graphs) // per_block), warps * 32, shared,
        (x, e, graphs, times, step, table, rows, graph_rows, plain_x, plain_y, len(graphs), shape.n_pad, shape.classes_x,
         int(shape.molecular), warps),
    )  # fmt: skip


def network_features(
    x: Tensor, e: Tensor, n: Tensor, table: Tensor, shape: Shape, launcher: Launcher
) -> tuple[Tensor, Tensor]:
    """Inputs float32[B, n_pad, channels_x] of nodes, zero where there is none, and float32[B, channels_y] of graphs.

    x: uint8[B, n_pad], e: uint8[B, n_pad, n_pad]: classes, 0 beyond the n: int64[B] nodes. table: `feature_table`, on the
    device. The last channel of a graph, the time, is left at 0.
    """
    count, device = len(x), x.device

    def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    rows, y = zeros(count, shape.n_pad, shape.channels_x), zeros(count, shape.channels_y)
    if not count:
        return rows, y
    in_ks = -(-shape.channels_x // 16)
    graphs = torch.stack((torch.arange(count, device=device) * shape.n_pad, n.to(device)), dim=1).to(torch.int32)
    for_products = zeros(-(-count * shape.n_pad // 16), in_ks, 32, 8, dtype=torch.bfloat16)  # not read here
    of_graphs = zeros(-(-count // 16), 1, 32, 8, dtype=torch.bfloat16)
    time = zeros(1, dtype=torch.int32)
    queue_features(launcher, shape, x.contiguous(), e.contiguous(), graphs, time, time, table, for_products, of_graphs, rows, y)
    return rows, y
