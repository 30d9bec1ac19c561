"""One denoising step of a batch of graphs, and all of them: the order of the launches and the buffers between them.

Guarantees: a graph's result is a function of (weights, seed, id, times) and not of its companions, its place or the
batch size; no host synchronisation between steps; a step can be captured in a CUDA graph, since the time is read from
device memory.
Knows nothing of: molecules, files, noise schedules (it gets times and tables), how a kernel is built.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdgdm.kernels.features import queue_features
from bitdgdm.kernels.graphs import Layout, layout
from bitdgdm.kernels.launch import Launcher
from bitdgdm.kernels.network import Layer, Network

NODE_TILE = 16896  # bytes of shared memory for a query tile of node.cu
ATTEND_F8_SHARED = 226048  # bytes of shared memory of edge_f8.cu
GRAPH_SHARED = 64 * 1024 + 8 * 1024  # four warps' sums and y, for 64 graphs of 64 channels or 32 of 128


def attend_steps(shared_bytes: int) -> int:
    """M-tiles a round of edge_attend for which there is shared memory (at most 16, one a warp)."""
    return min(16, (shared_bytes - 32768 - 2816) // 12288)


def attend_shared(steps: int) -> int:
    return steps * 12288 + 32768 + 2816


def node_tiles(shared_bytes: int) -> int:
    """Query tiles of a block of the node kernels of any GPU, for which there is shared memory."""
    return 8 if shared_bytes >= 8 * NODE_TILE else 4


def pool_block(n_pad: int, shared_bytes: int) -> tuple[int, int, int, int]:
    """Graphs a block, warps, tiles of 16 rows that they may touch, bytes of shared memory."""
    most = 144 if shared_bytes > 160_000 else 128  # rows: so that four, or two, blocks share a multiprocessor
    graphs = min(16, max(1, most // n_pad))  # 16 graphs of one size end where a tile ends
    tiles = (graphs * n_pad + 30) // 16
    return graphs, -(-graphs * n_pad // 16), tiles, tiles * (5120 + 64) + graphs * 16 + 336


@dataclass(frozen=True)
class Noise:
    """What the sampler knows of the diffusion, on the device.

    times: int32[steps + 1], decreasing to 0. tables_x, tables_e: float32[steps, K, K, K], posterior [z_t, x_0, z_s].
    """

    times: Tensor
    tables_x: Tensor
    tables_e: Tensor


class Denoiser:
    """The buffers and launches of one batch.

    x: uint8[B, n_pad], e: uint8[B, n_pad, n_pad]: classes, replaced by each step; 0 beyond the n nodes.
    """

    def __init__(self, network: Network, noise: Noise, n: Tensor, ids: Tensor, seed: int, launcher: Launcher) -> None:
        """n, ids: int64[B], nodes and sample id of each graph."""
        s, device = network.shape, launcher.device
        tables = (t.to(device).contiguous() for t in (noise.times, noise.tables_x, noise.tables_e))
        self.network, self.noise, self.launcher = network, Noise(*tables), launcher
        self.graph: object = None  # a captured step, kept alive by the batch
        self.layout: Layout = layout(n, s.n_pad, launcher.multiprocessors, device)
        at = self.layout
        self.attend_steps = attend_steps(launcher.shared_bytes)
        tiles16 = -(-at.count // 64) * 4  # blocks of the y path take 64 graphs

        def bf16(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.bfloat16, device=device)

        def rows16(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float16 if network.fp8 else torch.bfloat16, device=device)

        in_ks = -(-s.channels_x // 16)
        self.x = torch.zeros(at.count, s.n_pad, dtype=torch.uint8, device=device)
        self.e = torch.zeros(at.count, s.n_pad, s.n_pad, dtype=torch.uint8, device=device)
        self.ids = ids.to(device, torch.int64)
        self.seed = torch.tensor([seed & 0xFFFFFFFF, seed >> 32], dtype=torch.int64).to(torch.uint32).to(device)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.not_finite = torch.zeros(1, dtype=torch.int32, device=device)
        # of its own: nobody writes the rows behind the last graph's, and what becomes of them must stay finite
        self.rows_in = bf16(at.tiles, in_ks, 32, 8)
        self.graphs_in = bf16(tiles16, 1, 32, 8)
        self.X, self.q = (rows16(at.tiles, 16, 32, 8) for _ in range(2))
        self.gathered = rows16(at.tiles, 8 if network.fp8 else 16, 32, 8)  # e4m3: two a place of 16 bits
        self.kv = rows16(at.tiles * 16 + s.n_pad, 512)  # edge_attend reads up to n_pad rows beyond the last, as zeros
        self.E, self.E1 = rows16(at.m_tiles, 4, 32, 8), rows16(at.m_tiles, 4, 32, 8)
        self.y = rows16(tiles16, s.dy // 16, 32, 8)
        self.film_e, self.film_x = rows16(tiles16 * 16, 512), rows16(tiles16 * 16, 512)
        # In the place of what nobody reads while they are needed: keys and values between edge_attend and node_mid, queries
        # and what edge_attend has read of E at the end. All of these are written again before they are read.
        last_E = self.E1 if network.fp8 and s.layers % 2 == 0 else self.E
        self.z = _within(self.kv[: at.tiles * 16], self.kv.dtype, tiles16, 80, 32, 8)
        self.logits_x = _within(self.q, torch.float32, at.tiles, 16, 16)
        self.logits_e = _within(last_E, torch.float32, at.m_tiles, 16, 8)

    def _run(self, source: str, kernel: str, grid: int, block: int, shared: int, *args: Tensor | int | None) -> None:
        self.launcher.launch(source, kernel, grid, block, shared, args)

    def features(self, plain_x: Tensor | None = None, plain_y: Tensor | None = None) -> None:
        """Classes -> rows_in, graphs_in; also as float32[B, n_pad, channels], float32[B, channels] when given."""
        queue_features(
            self.launcher, self.network.shape, self.x, self.e, self.layout.graphs, self.noise.times, self.step,
            self.network.feature_table, self.rows_in, self.graphs_in, plain_x, plain_y,
        )  # fmt: skip

    def inputs(self) -> None:
        """Features and classes -> X, E, y, q, kv and the FiLM vectors of layer 0."""
        at, net, s = self.layout, self.network, self.network.shape
        self._run(
            "sample", "embed", -(-at.m_tiles * 128 // 256), 256, 0,
            self.E, at.tile_of, at.tile_start, at.rows, self.e, net.edge_table, self.step, at.m_tiles, s.n_pad, s.classes_e,
        )  # fmt: skip
        self._run(
            self._graph_source, "graph_in", self._graph_blocks, 256, self._graph_shared,
            self.graphs_in, self.y, self.film_e, self.film_x, net.graph_in, net.graph_in_vec,
        )  # fmt: skip
        self._node("node_in", self.rows_in, self.X, self.q, self.kv, net.node_in, net.node_in_vec)

    @property
    def _graph_blocks(self) -> int:
        return len(self.y) * 16 * self.network.shape.dy // 4096

    @property
    def _graph_source(self) -> str:
        return "graph_path_f8" if self.network.fp8 else "graph_path"

    @property
    def _graph_shared(self) -> int:
        return GRAPH_SHARED + (8 * 1024 if self.network.fp8 else 0)  # y before rounding too

    def _node(self, kernel: str, *args: Tensor) -> None:
        tiles, blocks = self.layout.tiles, -(-self.layout.tiles // 8)
        if self.network.fp8:
            self._run("node_f8", kernel, min(-(-tiles // 12), self.launcher.multiprocessors), 512, 229632, *args, tiles)
        elif self.network.hopper:
            even = min(blocks + blocks % 2, self.launcher.multiprocessors & ~1)  # blocks may come in pairs
            self._run("node_wg_s8" if self.network.int8 else "node_wg", kernel, even, 384, 213120, *args, tiles)
        else:
            each = node_tiles(self.launcher.shared_bytes)
            self._run("node", kernel, -(-tiles // each), 256, each * NODE_TILE, *args, tiles)

    def pool(self, p: Layer, E: Tensor) -> None:
        """X, E -> z: mean, least, largest, deviation of every channel over the rows of a graph and its padding.

        z takes the place of keys and values.
        """
        at, n_pad = self.layout, self.network.shape.n_pad
        each, warps, tiles, shared = pool_block(n_pad, self.launcher.shared_bytes)
        self._run(
            self._graph_source, "pool", -(-at.count // each) * 4, warps * 32, shared,
            self.X, E, at.tile_start, at.heads, at.rows, p.pad, self.z, at.count, n_pad, each, tiles,
        )  # fmt: skip

    def layer(self, i: int) -> None:
        """Layer i; the last one ends in logits.

        E is in `self.E` before it; after it too, but where edge_attend has the feed-forward net of E: then layers go from
        E to E1 and from E1 to E in turn, since other blocks still read what a block replaces.
        """
        at, s, p = self.layout, self.network.shape, self.network.layers[i]
        last, fp8 = i == s.layers - 1, self.network.fp8
        E, E1 = (self.E1, self.E) if fp8 and i % 2 else (self.E, self.E1)
        source, block, shared = "edge_attend", 512, attend_shared(self.attend_steps)
        net: tuple[Tensor | None, ...] = ()
        if fp8:
            source, block, shared = "edge_f8", 640, ATTEND_F8_SHARED
            net = (None, None) if last else (p.ffn1, p.ffn_vec)
        elif self.network.hopper:
            source, shared = "edge_wg", 201728
        self._run(
            source, "edge_attend", len(at.block_tile) - 1, block, shared,
            E, E1, self.q, self.kv, self.film_e, self.film_x, self.gathered, at.tile_start, at.rows,
            at.block_tile, p.w_mul, p.w_add, p.score_bias, p.w_e_out, p.e_out_vec, *net,
        )  # fmt: skip
        if last:
            self._ffn(p, last, E1)
            self._node("node_out", self.gathered, self.X, self.logits_x, p.node, p.node_vec)
            return
        self.pool(p, E)
        self._run(
            self._graph_source, "graph_mid", self._graph_blocks, 256, self._graph_shared,
            self.z, self.y, self.film_e, self.film_x, p.graph, p.graph_vec,
        )  # fmt: skip
        if not fp8:
            self._ffn(p, last, E1)
        self._node("node_mid", self.gathered, self.X, self.q, self.kv, p.node, p.node_vec)

    def _ffn(self, p: Layer, last: bool, E1: Tensor) -> None:
        tiles, n, sms = self.layout.m_tiles, self.network, self.launcher.multiprocessors
        blocks = -(-tiles // 8)
        args: tuple[Tensor | int | None, ...]
        if n.fp8:
            args = (E1, p.ffn1, p.ffn_vec, tiles, self.logits_e)
            self._run("edge_ffn_f8", "edge_ffn_out", min(blocks, 2 * sms), 256, 40064, *args)
        elif n.hopper and last:
            args = (E1, p.ffn1, p.ffn_vec, tiles, self.logits_e)
            self._run("edge_ffn_wg", "edge_ffn_out", min(blocks, 2 * sms), 256, 55296, *args)
        elif n.hopper:
            self._run("edge_ffn_wg", "edge_ffn", min(blocks, 2 * sms), 256, 34304, E1, self.E, p.ffn1, p.ffn_vec, tiles)
        elif last:
            args = (E1, p.ffn1, p.ffn2, p.ffn_vec, tiles, n.edge_out1, n.edge_out2, self.logits_e)
            self._run("edge_ffn", "edge_ffn_out", min(blocks, 3 * sms), 128, 52 * 1024 + 456 * 4, *args)
        else:
            args = (E1, self.E, p.ffn1, p.ffn2, p.ffn_vec, tiles)
            self._run("edge_ffn", "edge_ffn", min(blocks, 3 * sms), 128, 32 * 1024 + 320 * 4, *args)

    def forward(self) -> None:
        """The network: classes of this step -> logits_x, logits_e."""
        self.features()
        self.inputs()
        for i in range(self.network.shape.layers):
            self.layer(i)

    def draw(self) -> None:
        """Logits -> the classes of the next step; the step counter moves on."""
        at, s, noise = self.layout, self.network.shape, self.noise
        slots = at.count * (s.n_pad + s.n_pad * s.n_pad)
        self._run(
            "sample", "sample", -(-slots // 128), 128, 0,
            self.logits_x, self.logits_e, self.x, self.e, at.graphs, at.tile_start, self.ids, self.seed, noise.times,
            self.step, noise.tables_x, noise.tables_e, self.not_finite, at.count, s.n_pad, s.classes_x, s.classes_e,
        )  # fmt: skip
        self._run("sample", "advance", 1, 32, 0, self.step)

    def logits(self) -> tuple[Tensor, Tensor]:
        """What the network says, as the seam wants it: float32[B, n_pad, K], float32[B, n_pad, n_pad, K] symmetric.

        0 on padded rows and on the diagonal of E. For tests and for a caller with its own sampler.
        """
        at, s = self.layout, self.network.shape
        graph, _, n, i = at.rows[: at.n_rows].long().unbind(1)
        x = self.logits_x.view(-1, 16)[: at.n_rows, : s.classes_x] + _one_hot(self.x[graph, i], s.classes_x)
        out_x = x.new_zeros(at.count, s.n_pad, s.classes_x)
        out_x[graph, i] = x

        j = torch.arange(s.n_pad, device=x.device)
        row = torch.arange(at.n_rows, device=x.device)
        m_tile = at.tile_start.long()[row >> 4][:, None] + j
        real = (j < n[:, None]) & (j != i[:, None])
        e = self.logits_e[m_tile.clamp(max=at.m_tiles - 1), (row & 15)[:, None], : s.classes_e]
        e = (e + _one_hot(self.e[graph, i].long(), s.classes_e)) * real[..., None]
        out_e = e.new_zeros(at.count, s.n_pad, s.n_pad, s.classes_e)
        out_e[graph, i] = e
        return out_x, (out_e + out_e.transpose(1, 2)) / 2


def _within(buffer: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor in the place of `buffer`, or one of its own where that is too small."""
    size = math.prod(shape) * dtype.itemsize
    if size > buffer.nbytes:
        return torch.zeros(shape, dtype=dtype, device=buffer.device)
    return buffer.view(-1).view(torch.uint8)[:size].view(dtype).view(shape)


def _one_hot(classes: Tensor, k: int) -> Tensor:
    return torch.eye(k, device=classes.device)[classes.long()]
