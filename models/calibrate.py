"""Statistics of the Linears' inputs from molecules that the full-precision network draws by itself.

Guarantees: no data set is read; only rows of real nodes, pairs and graphs count; the same statistics for the same
(model, molecules, steps, seed, choice) on one kind of machine; second moments are products of at most a few thousand
rows in float32, summed in float64.
Knows nothing of: recipes and what they do with the statistics.

choice "uniform": every step of every trajectory counts once. "skewed": as many (molecule, step) pairs are drawn, with
times from a normal distribution of mean 0.4 T and deviation T / 2 cut to 1..T, so that times near the molecule count
more. Source: Shang et al., Post-training Quantization on Diffusion Models (PTQ4DM), CVPR 2023, whose rule is mean <=
T / 2 and deviation T / 2.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bitdgdm.models.noise import steps as times_of
from bitdgdm.models.sampler import start_chain
from bitdgdm.models.source import SourceModel
from bitdgdm.models.trajectory import Where, walk
from bitdgdm.quant.stats import LayerStats

SAMPLE = 1024
"""Rows that are kept of each input."""

CHOICES = ("uniform", "skewed")
_ROWS_A_PRODUCT = 2048
_SKEWED_MEAN, _SKEWED_DEVIATION = 0.4, 0.5


def calibrate(
    source: SourceModel,
    names: Sequence[str],
    *,
    molecules: int = 64,
    steps: int = 50,
    seed: int = 0,
    choice: str = "uniform",
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> dict[str, LayerStats]:
    """Return the statistics of the inputs of the Linears `names`.

    Inputs that several Linears share (q, k and v) are computed once and shared by their LayerStats.
    progress is told the fraction of all steps that is done.
    Raises: ValueError for another choice or nothing to draw; LogitsNotFinite.
    """
    counts = visits(source.config.diffusion_steps, molecules, steps, seed, choice)
    n = start_chain(source.config, seed, torch.arange(molecules), steps).n
    seen = counts.sum(0)
    rows: dict[Where, int] = {
        "node": int((seen * n).sum()),
        "edge": int((seen * n * n).sum()),
        "graph": int(seen.sum()),
    }
    rng = np.random.default_rng(seed)
    kept: dict[Where, Tensor] = {
        where: torch.from_numpy(np.sort(rng.choice(total, min(SAMPLE, total), replace=False)))
        for where, total in rows.items()
    }
    collectors: dict[str, _Collector] = {}
    shared: dict[str, str] = {}  # a Linear -> the first one that reads the same input
    recent: dict[Where, list[tuple[str, Tensor]]] = {"node": [], "edge": [], "graph": []}

    def visit(name: str, where: Where, t: int, x: Tensor) -> None:
        if name not in shared:
            same = [first for first, rows in recent[where] if rows is x]
            shared[name] = same[0] if same else name
            if not same:
                with torch.inference_mode(False):  # its tensors outlive the pass and may meet autograd
                    collectors[name] = _Collector(kept[where], x.shape[1], x.device)
                recent[where] = [*recent[where][-1:], (name, x)]
        if shared[name] == name:
            collectors[name].add(x, t)

    walk(
        source,
        names,
        visit,
        molecules=molecules,
        steps=steps,
        seed=seed,
        counts=counts,
        device=device,
        progress=progress,
    )
    found = {name: c.stats(source.config.diffusion_steps) for name, c in collectors.items()}
    return {name: found[shared[name]] for name in names}


def visits(total: int, molecules: int, steps: int, seed: int, choice: str) -> Tensor:
    """int64[steps, molecules]: how often each state of each trajectory counts; the sum is molecules * steps."""
    if choice not in CHOICES:
        raise ValueError(f"choice is one of {', '.join(CHOICES)}, not {choice!r}")
    if choice == "uniform":
        return torch.ones(steps, molecules, dtype=torch.int64)
    rng = np.random.default_rng(seed)
    times = np.array(times_of(total, steps)[:-1])
    drawn = np.zeros(0)
    while len(drawn) < molecules * steps:
        more = rng.normal(_SKEWED_MEAN * total, _SKEWED_DEVIATION * total, molecules * steps)
        drawn = np.concatenate((drawn, more[(more >= 1) & (more <= total)]))
    nearest = np.abs(drawn[: molecules * steps, None] - times).argmin(1)
    counts = torch.zeros(steps, molecules, dtype=torch.int64)
    who = np.tile(rng.permutation(molecules), steps)  # every molecule counts `steps` times
    counts.index_put_(
        (torch.from_numpy(nearest), torch.from_numpy(who)),
        torch.ones(len(who), dtype=torch.int64),
        accumulate=True,
    )
    return counts


class _Collector:
    """Running sums of one input; kept: int64[m], ascending positions of the rows to keep among all rows to come."""

    def __init__(self, kept: Tensor, width: int, device: torch.device) -> None:
        # room for everything at once: small pieces kept between large temporary ones would cost gigabytes
        self._kept, self._rows, self._waiting = kept, 0, 0
        self._sample = torch.empty(len(kept), width)
        self._time = torch.empty(len(kept), dtype=torch.int64)
        self._buffer = torch.empty(_ROWS_A_PRODUCT, width, device=device)
        self._moment = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._absmax = torch.zeros(width, device=device)

    def add(self, x: Tensor, t: int) -> None:
        """x: float32[m, in]."""
        first, last = torch.searchsorted(self._kept, torch.tensor([self._rows, self._rows + len(x)])).tolist()
        self._sample[first:last] = x[(self._kept[first:last] - self._rows).to(x.device)].cpu()
        self._time[first:last] = t
        self._rows += len(x)
        while len(x):  # few, large products: a step shows only a few rows of a graph's 2048 channels
            space = _ROWS_A_PRODUCT - self._waiting
            part, x = x[:space], x[space:]
            self._buffer[self._waiting : self._waiting + len(part)] = part
            self._waiting += len(part)
            if self._waiting == _ROWS_A_PRODUCT:
                self._sum()

    def _sum(self) -> None:
        x = self._buffer[: self._waiting]
        self._moment += x.T @ x
        if self._waiting:
            torch.maximum(self._absmax, x.abs().amax(0), out=self._absmax)
        self._waiting = 0

    def stats(self, diffusion_steps: int) -> LayerStats:
        self._sum()
        return LayerStats(
            sample=self._sample,
            time=self._time,
            second_moment=(self._moment / self._rows).float().cpu(),
            absmax=self._absmax.cpu(),
            rows=self._rows,
            diffusion_steps=diffusion_steps,
        )
