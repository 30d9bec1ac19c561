"""The features of graphs that a network in PyTorch is given, as one launch (features.cu).

Guarantees: what `Denoiser.features` computes, as float32; a graph's features depend on the graph alone.
Knows nothing of: networks, noise, the time.
"""

import torch
from torch import Tensor

from bitdgdm.kernels.denoise import features_shared
from bitdgdm.kernels.launch import Launcher
from bitdgdm.kernels.network import Shape, feature_table

MOST_NODES = 64  # neighbours are bits of one word


def network_features(x: Tensor, e: Tensor, n: Tensor, shape: Shape, launcher: Launcher) -> tuple[Tensor, Tensor]:
    """Inputs float32[B, n_pad, channels_x] of nodes, zero where there is none, and float32[B, channels_y] of graphs.

    x: uint8[B, n_pad], e: uint8[B, n_pad, n_pad]: classes, 0 beyond the n: int64[B] nodes. The last channel of a graph,
    the time, is left at 0.
    """
    count, device = len(x), x.device

    def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    rows, y = zeros(count, shape.n_pad, shape.channels_x), zeros(count, shape.channels_y)
    if not count:
        return rows, y
    in_ks = -(-shape.channels_x // 16)
    places = torch.stack((torch.arange(count, device=device) * shape.n_pad, n.to(device)), dim=1).to(torch.int32)
    for_products = zeros(-(-count * shape.n_pad // 16), in_ks, 32, 8, dtype=torch.bfloat16)  # not read here
    of_graphs = zeros(-(-count // 16), 1, 32, 8, dtype=torch.bfloat16)
    time = zeros(1, dtype=torch.int32)
    warps, shared = features_shared(shape.n_pad)
    per_block = warps * (32 // min(32, shape.n_pad + shape.n_pad % 2))
    launcher.launch(
        "features", "features", -(-count // per_block), warps * 32, shared,
        (x.contiguous(), e.contiguous(), places, time, time, feature_table(shape).to(device), for_products, of_graphs, rows, y,
         count, shape.n_pad, shape.classes_x, int(shape.molecular), warps),
    )  # fmt: skip
    return rows, y
