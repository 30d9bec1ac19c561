"""The baselines: a denoising chain in PyTorch, bf16, with or without our features kernel, compiled or not.

Guarantees: the same chain and draws as the product's sampler; a step waits for nothing, so that it can be captured in
a CUDA graph; all work is queued on the current stream (for our features kernel: inside `device.stream()`).
Knows nothing of: what is measured.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitdgdm.kernels.denoise import Denoiser
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.features import network_input
from bitdgdm.models.noise import posterior
from bitdgdm.models.philox import edge_slots, node_slots, philox
from bitdgdm.models.sampler import draw
from bitdgdm.models.seam import Chain

Network = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class TorchChain:
    """A chain on its way; `step` is one denoising step, `x` and `e` are its classes, int64."""

    def __init__(
        self, network: nn.Module, config: DigressConfig, chain: Chain, batch: Denoiser | None, compiled: bool = False
    ) -> None:
        """network: in bf16 on the chain's device. batch: whose features kernel runs; None takes PyTorch's features."""
        device, n_pad = chain.ids.device, config.n_pad
        self.config, self.chain, self.batch = config, chain, batch
        self.x, self.e = chain.x.clone(), chain.e.clone()
        self.k = torch.zeros(1, dtype=torch.int64, device=device)
        self.times = torch.tensor(chain.times, device=device)
        self.rows, self.cols = (t.to(device) for t in torch.triu_indices(n_pad, n_pad, 1))
        self.slots = torch.cat((node_slots(n_pad, device), edge_slots(n_pad, self.rows, self.cols)))
        self.mask = torch.arange(n_pad, device=device) < chain.n[:, None]
        self.pairs = self.mask[:, :, None] & self.mask[:, None]
        self.off_diagonal = ~torch.eye(n_pad, dtype=torch.bool, device=device)
        self.one_hot_x = torch.eye(config.output_dims.X, device=device)
        self.one_hot_e = torch.eye(config.output_dims.E, device=device)
        size = len(chain.ids)
        self.plain_x = torch.zeros(size, n_pad, config.input_dims.X, device=device)
        self.plain_y = torch.zeros(size, config.input_dims.y, device=device)
        self.network: Network = torch.compile(network, fullgraph=True, dynamic=False) if compiled else network
        self.draws = torch.compile(self._draws, fullgraph=True, dynamic=False) if compiled else self._draws

    def step(self) -> None:
        """Queue one step."""
        seen = self.pairs & (self.off_diagonal | (self.k > 0))  # z_T has no class on the diagonal
        E = self.one_hot_e[self.e] * seen[..., None]
        if self.batch is None:
            X = self.one_hot_x[self.x] * self.mask[..., None]
            t = (self.times.index_select(0, self.k) / self.config.diffusion_steps).expand(len(X))
            X, E, y = network_input(X, E, t, self.mask, self.config)
        else:
            self.batch.x.copy_(self.x)
            self.batch.e.copy_(self.e)
            self.batch.step.copy_(self.k)
            self.batch.features(self.plain_x, self.plain_y)
            X, y = self.plain_x, self.plain_y
        logits_x, logits_e = self.network(X.bfloat16(), E.bfloat16(), y.bfloat16(), self.mask)
        x, e = self.draws(logits_x, logits_e, self.x, self.e, self.k)
        self.x.copy_(x)
        self.e.copy_(e)
        self.k += 1

    def _draws(self, logits_x: Tensor, logits_e: Tensor, x: Tensor, e: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        chain, n_pad = self.chain, self.config.n_pad
        u = philox(chain.seed, chain.ids[:, None], self.times.index_select(0, k + 1), self.slots)
        p_x = posterior(logits_x.float().softmax(-1), x, chain.node_tables.index_select(0, k)[0])
        upper, clean = e[:, self.rows, self.cols], logits_e[:, self.rows, self.cols].float().softmax(-1)
        p_e = posterior(clean, upper, chain.edge_tables.index_select(0, k)[0])
        edges = draw(p_e, u[:, n_pad:])
        full = torch.zeros_like(e)
        full[:, self.rows, self.cols] = edges
        full[:, self.cols, self.rows] = edges
        return draw(p_x, u[:, :n_pad]) * self.mask, full * self.pairs


def captured(step: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    """Warm `step` up on the current stream, which must be `stream`, and return its CUDA graph's replay."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def seconds_a_step(step: Callable[[], object], steps: int, runs: int) -> list[float]:
    """Device time of a step in each run, on the current stream; two steps warm up."""
    step()
    step()
    found = []
    for _ in range(runs):
        torch.cuda.synchronize()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(steps):
            step()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1000 / steps)
    return found
