"""What the Linears of a full-precision network see while it draws molecules by itself: no data set is needed.

Guarantees: rows of padding are never shown; the same rows for the same (model, molecules, steps, seed) on one kind of
machine; Linears that read the same tensor are shown the same rows object, so that a reader can tell.
Knows nothing of: what is done with the rows (calibrate.py, outliers.py).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bitdgdm.models.digress import build
from bitdgdm.models.engine import TorchEngine
from bitdgdm.models.sampler import sample_micro_batch
from bitdgdm.models.seam import Engine
from bitdgdm.models.source import SourceModel

BATCH = 64
"""Molecules that run together."""

Where = Literal["node", "edge", "graph"]


Visit = Callable[[str, Where, int, Tensor], object]
"""Told of one Linear's input at one time: name, where its rows are from, t, rows float32[m, in] on the engine's device."""


def walk(
    source: SourceModel,
    names: Sequence[str],
    visit: Visit,
    *,
    molecules: int = 64,
    steps: int = 50,
    seed: int = 0,
    counts: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> None:
    """Draw the molecules 0 .. molecules - 1 of `seed` and show `visit` every input of the Linears `names`.

    counts: int64[steps, molecules], how many times the rows of a molecule are shown at a step; once when left out.
    progress is told the fraction of all steps that is done.
    Raises: ValueError if there is nothing to draw, or counts has another shape; LogitsNotFinite.
    """
    if molecules < 1:
        raise ValueError(f"a trajectory needs a molecule, not {molecules}")
    if counts is None:
        counts = torch.ones(steps, molecules, dtype=torch.int64)
    if tuple(counts.shape) != (steps, molecules):
        raise ValueError(f"counts has shape {list(counts.shape)}, not {[steps, molecules]}")
    network = build(source.config, source.weights, source.name)
    watched = _Watched(TorchEngine(network, source.config, device, name=source.name), visit)
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(watched.hook(name))
    size = min(BATCH, molecules)
    starts = range(0, molecules, size)
    for done, first in enumerate(starts):
        shown = torch.zeros(steps, size, dtype=torch.int64)  # what fills up the last batch is not shown
        part = counts[:, first : first + size]
        shown[:, : part.shape[1]] = part
        watched.begin(shown)

        def on_step(step: int, done: int = done) -> None:
            if progress is not None:
                progress((done * steps + step) / (len(starts) * steps))

        sample_micro_batch(watched, source.config, seed, first, size, steps, on_step)


class _Watched:
    """An engine that knows, while its network runs, which rows are real and how often each is to be shown."""

    def __init__(self, engine: Engine, visit: Visit) -> None:
        self.name, self.config, self.device, self.dtype = (
            engine.name,
            engine.config,
            engine.device,
            engine.dtype,
        )
        self._engine, self._visit = engine, visit
        self._recent: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()
        self._places: dict[Where, Tensor] = {}
        self._counts = torch.zeros(0, 0, dtype=torch.int64)
        self._step = self._t = 0

    def begin(self, counts: Tensor) -> None:
        """Another batch. counts: int64[steps, B]."""
        self._counts, self._step = counts.to(self.device), 0

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        counts, self._t = self._counts[self._step], int(t[0])
        pairs = node_mask[:, :, None] & node_mask[:, None, :]
        self._places = {
            "node": _repeated((node_mask * counts[:, None]).flatten()),
            "edge": _repeated((pairs * counts[:, None, None]).flatten()),
            "graph": _repeated(counts),
        }
        self._step += 1
        result = self._engine.logits(X, E, t, node_mask)
        self._recent.clear()
        return result

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A forward pre-hook for one Linear."""

        def show(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            where: Where = ("graph", "node", "edge")[x.ndim - 2]
            rows = self._rows(x, self._places[where])
            if len(rows):
                self._visit(name, where, self._t, rows)

        return show

    def _rows(self, x: Tensor, places: Tensor) -> Tensor:
        """The shown rows of x; of a tensor seen a moment ago the very same object."""
        if id(x) not in self._recent:
            while len(self._recent) >= 4:  # a layer goes back to x, e and y after at most one other input
                self._recent.popitem(last=False)
            self._recent[id(x)] = (x, x.flatten(0, -2)[places])  # x is held, so that its id is not used again
        return self._recent[id(x)][1]


def _repeated(counts: Tensor) -> Tensor:
    """int64[sum of counts]: each index as often as it counts."""
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
