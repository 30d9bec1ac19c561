"""How a batch of graphs of different sizes lies in memory: rows, query tiles, m-tiles.

Guarantees: only real rows (i < n) and, but for tiles that mix sizes, only real pairs (j < n) exist; no result of a graph
depends on its place. Built on the host once a batch, since the sizes stay the same through all steps.
Knows nothing of: features, weights, which kernel reads what.

Rows (graph, i) are sorted by n, so that the 16 rows of a query tile mostly share it; a tile has as many m-tiles
(slices at j = 0, 1, ...) as its largest graph has nodes. The last tile is filled up with copies of the last row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Index tables on the device. All int32.

    graphs [B, 2]: first row, n. rows [16 tiles, 4]: graph, first row of the graph, n, i. heads [B, 4]: the first row of
    every graph, in the order of rows. tile_start [tiles + 1]: in m-tiles. tile_of [m_tiles]. block_tile [blocks + 1]:
    contiguous shares of the tiles with about equally many m-tiles.
    """

    count: int
    n_pad: int
    n_rows: int
    tiles: int
    m_tiles: int
    graphs: Tensor
    rows: Tensor
    heads: Tensor
    tile_start: Tensor
    tile_of: Tensor
    block_tile: Tensor


def layout(n: Tensor, n_pad: int, blocks: int, device: torch.device) -> Layout:
    """Lay out graphs with n: int64[B] nodes each (1 <= n <= n_pad) for `blocks` blocks of edge_attend."""
    sizes = n.cpu().numpy().astype(np.int64)
    if sizes.size == 0 or sizes.min() < 1 or sizes.max() > n_pad:
        raise ValueError(f"graphs have 1 to {n_pad} nodes, not {sizes.min(initial=0)} to {sizes.max(initial=0)}")
    order = np.argsort(-sizes, kind="stable")
    first_sorted = np.concatenate(([0], np.cumsum(sizes[order])))
    first = np.empty_like(sizes)
    first[order] = first_sorted[:-1]
    n_rows = int(first_sorted[-1])
    tiles = -(-n_rows // 16)

    graph = np.repeat(order, sizes[order])
    node = np.arange(n_rows) - first[graph]
    rows = np.stack((graph, first[graph], sizes[graph], node), axis=1)
    rows = np.concatenate((rows, np.repeat(rows[-1:], tiles * 16 - n_rows, axis=0)))

    per_tile = rows[:, 2].reshape(tiles, 16).max(axis=1)
    tile_start = np.concatenate(([0], np.cumsum(per_tile)))
    m_tiles = int(tile_start[-1])
    shares = np.arange(blocks + 1) * m_tiles / blocks
    block_tile = np.searchsorted(tile_start, shares, side="left")

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)

    return Layout(
        len(sizes), n_pad, n_rows, tiles, m_tiles,
        on_device(np.stack((first, sizes), axis=1)), on_device(rows), on_device(rows[first_sorted[:-1]]),
        on_device(tile_start), on_device(np.repeat(np.arange(tiles), per_tile)), on_device(block_tile),
    )  # fmt: skip
