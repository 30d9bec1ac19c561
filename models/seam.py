"""What the sampler and an engine say to each other.

Guarantees: values and protocols only, no code that computes.
Knows nothing of: which engines there are, how the sampler draws.

An engine answers for one step (`Engine.logits`); one that can also run all steps by itself is a `LoopEngine`. A
LoopEngine must give a graph the same bytes whatever its companions, their number and its place (law L1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bitdgdm.models.digress_config import DigressConfig


class Engine(Protocol):
    """What the sampler needs of a network on a device.

    name: model and recipe, for messages. dtype: of the matrix products that aren't quantized.
    It must be independent of a graph's companions for a fixed batch shape, keep n_pad, and take node_mask as it is
    (rows of real nodes come first).
    """

    name: str
    config: DigressConfig
    device: torch.device
    dtype: torch.dtype

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32[B, n_pad, node classes] and float32[B, n_pad, n_pad, edge classes], E symmetric.

        X: float32[B, n_pad, node classes] and E: float32[B, n_pad, n_pad, edge classes], one-hot, 0 where
        padded. t: int64[B], 1..T. node_mask: bool[B, n_pad], True for real nodes, which come first.
        """
        ...


@dataclass(frozen=True)
class Chain:
    """A batch of graphs at time T and everything that leads them to time 0; tensors are on the engine's device.

    ids: int64[B], keys of the draws with `seed`. n: int64[B] nodes. x: int64[B, n_pad], e: int64[B, n_pad, n_pad]
    symmetric: classes of z_T, 0 beyond the n nodes. times: steps + 1, decreasing to 0. node_tables, edge_tables:
    float32[steps, z_t, x_0, z_s].
    """

    seed: int
    ids: Tensor
    n: Tensor
    x: Tensor
    e: Tensor
    times: tuple[int, ...]
    node_tables: Tensor
    edge_tables: Tensor

    def part(self, first: int, count: int) -> "Chain":
        """The graphs first .. first + count - 1 of the batch."""
        ids, n, x, e = (t[first : first + count] for t in (self.ids, self.n, self.x, self.e))
        return Chain(self.seed, ids, n, x, e, self.times, self.node_tables, self.edge_tables)


@runtime_checkable
class LoopEngine(Engine, Protocol):
    """An engine that runs a whole chain on its device."""

    def denoise(
        self, chain: Chain, on_step: Callable[[int], object] | None = None
    ) -> tuple[Tensor, Tensor, bool]:
        """Return the classes at time 0, shaped as in `chain` in an integer type, and whether all was finite.

        on_step is told the number of steps that were queued. Raises: DeviceMemoryFull.
        """
        ...

    def begin(
        self, start: Callable[[], Chain], on_step: Callable[[int], object] | None = None
    ) -> Callable[[], tuple[Tensor, Tensor, bool]]:
        """Queue the chain that `start` makes; the function returned waits for its end and gives what denoise gives.

        The next chain may be begun, by another thread too, before this one's end. Raises: DeviceMemoryFull.
        """
        ...
