"""Ranges of a layer's input, chosen before it runs: one per bin of diffusion times, or one per time.

Guarantees: low <= 0 <= high, both finite; low = -high where the codes are symmetric; "mse" ranges, learned bins and
smooth tables never have a larger squared error on the given rows than one range for all times from the same grid; a
bin without rows takes the range of the nearest bin that has some. The result depends on the arguments only.
Knows nothing of: weights; how a table is looked up at run time. Outliers that stay in 16 bit are to be zero in the rows.

The methods, each adapted to the input of one Linear of a graph diffusion network:
PTQ4DM (Shang et al., CVPR 2023; 42Shawn/PTQ4DM at 613886e): one range with the least squared error, on rows whose
  times are drawn from a skewed normal (the calibration's part). Their search minimises the 2.4th power; here the square,
  which is what the layer's output loses. Cost: nothing at run time.
TDQ (So et al., NeurIPS 2023): a small network maps t to the interval; `smooth_range` trains it against the quantization
  error of the layer's input alone instead of the network's loss, and stores its T values. Cost: 2 T numbers a layer.
APQ-DM (Wang et al., CVPR 2024): groups of times that share a quantizer. They relax the assignment of times to groups
  and descend; neighbouring times are alike here, so groups are intervals and `learned_bins` finds the best ones exactly,
  by dynamic programming on the same objective. Cost: 2 numbers a group and a byte a time.
QVD (Tian et al., ACM MM 2024): keeps features that carry the time apart. Here time enters through y alone, a percent of
  the work, so its layers get more bits by the recipe's overrides; its integration of channel ranges becomes smoothing.
"""

import math

import torch
from torch import Tensor

QUANTILE = 0.999
"""Share of entries inside a "quantile" range, on each side."""

CELLS = 64
"""Time intervals out of which learned bins are put together."""

ENTRIES = 2**18
"""Entries of the sample that a search looks at; rows are left out evenly beyond that."""

_SHRINK = {False: 0.86, True: 0.72}
_TRIED = {False: 24, True: 12}
_TINY = float(torch.finfo(torch.float32).tiny)


def equal_bins(bins: int, steps: int) -> Tensor:
    """bin of each time, int16[steps + 1]: min(bins - 1, (t - 1) * bins // steps) for t in 1..steps."""
    t = torch.arange(-1, steps).clamp_min(0)
    return (t * bins // steps).clamp_max(bins - 1).to(torch.int16)


def static_range(
    sample: Tensor, time: Tensor, bits: int, asymmetric: bool, bins: int, steps: int, how: str
) -> tuple[Tensor, Tensor]:
    """low, high float32[bins] over bins of equal length. sample: float[m, in]; time: int[m] in 1..steps."""
    return range_of_bins(sample, equal_bins(bins, steps)[time.long()].long(), bins, bits, asymmetric, how)


def range_of_bins(
    sample: Tensor, bin_of_row: Tensor, bins: int, bits: int, asymmetric: bool, how: str
) -> tuple[Tensor, Tensor]:
    """low, high float32[bins]. bin_of_row: int64[m]. how: "absmax" (nothing saturates), "quantile" or "mse"."""
    low, high = torch.zeros(bins), torch.zeros(bins)
    if how == "mse":
        rows = _rows(sample)
        errors, lows, highs = _error_table(sample[rows], bits, asymmetric)
        total = torch.zeros(bins, *errors.shape[1:], dtype=torch.float64)
        total.index_add_(0, bin_of_row[rows], errors)
        best = total.flatten(1).argmin(dim=1)
        low, high = lows[best // len(highs)], highs[best % len(highs)]
        seen = torch.bincount(bin_of_row[rows], minlength=bins) > 0
    else:
        for b in range(bins):
            rows = sample[bin_of_row == b]
            if len(rows):
                low[b], high[b] = _extent(rows.float().flatten(), how)
        seen = high > low
    if not asymmetric:
        high = torch.maximum(high, -low)
        low = -high
    return _filled(low, high, seen)


def learned_bins(sample: Tensor, time: Tensor, bits: int, asymmetric: bool, bins: int, steps: int) -> Tensor:
    """bin of each time, int16[steps + 1]: intervals whose best ranges together have the least squared error."""
    rows = _rows(sample)
    cells = min(CELLS, steps)
    cell_of_t = equal_bins(cells, steps).long()
    errors, _, _ = _error_table(sample[rows], bits, asymmetric)
    by_cell = torch.zeros(cells, errors[0].numel(), dtype=torch.float64)
    by_cell.index_add_(0, cell_of_t[time[rows].long()], errors.flatten(1))
    before = torch.nn.functional.pad(by_cell.cumsum(dim=0), (0, 0, 1, 0))
    cost = torch.full((cells + 1, cells + 1), torch.inf, dtype=torch.float64)
    for start in range(cells):
        cost[start, start + 1 :] = (before[start + 1 :] - before[start]).amin(dim=1)
    total, best_starts = cost[0], []
    for _ in range(min(bins, cells) - 1):
        joined = total[:, None] + cost
        total = joined.amin(dim=0)
        best_starts.append(joined.argmin(dim=0))
    edges = [cells]
    for best in reversed(best_starts):
        edges.append(int(best[edges[-1]]))
    return torch.bucketize(cell_of_t, torch.tensor(sorted(edges)[:-1], dtype=torch.int64), right=True).to(
        torch.int16
    )


def smooth_range(
    sample: Tensor, time: Tensor, bits: int, asymmetric: bool, steps: int, *, iterations: int = 150
) -> tuple[Tensor, Tensor]:
    """low, high float32[steps], entry t - 1 for time t: a small network of t, trained on the squared error.

    Sines of t, one hidden layer of 16, fixed starting weights, Adam on all rows; the best state seen is kept, and the
    first one is the best constant range.
    """
    rows = _rows(sample)
    errors, lows, highs = _error_table(sample[rows], bits, asymmetric)
    errors = errors / errors.sum(dim=0).min().clamp_min(1e-300)
    flat = int(errors.sum(dim=0).argmin())
    first = (flat // len(highs), flat % len(highs))
    features = _sines(torch.arange(1, steps + 1), steps)
    seen = features[time[rows].long() - 1]
    generator = torch.Generator().manual_seed(0)
    hidden = (
        torch.randn(features.shape[1], 16, generator=generator, dtype=torch.float64)
        / features.shape[1] ** 0.5
    )
    parameters = [hidden, *(torch.zeros(s, dtype=torch.float64) for s in ((16,), (16, 2), (2,)))]
    best, least = [p.clone() for p in parameters], math.inf
    with torch.enable_grad():
        for p in parameters:
            p.requires_grad_()
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        for _ in range(iterations):
            loss = _interpolated(errors, _place(seen, parameters, first)).sum()
            if float(loss.detach()) < least:
                best, least = [p.detach().clone() for p in parameters], float(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    places = _place(features, best, first)
    high = _between(highs, places[:, 1])
    low = _between(lows, places[:, 0]) if asymmetric else -high
    return low, high


def _extent(entries: Tensor, how: str) -> tuple[float, float]:
    if how == "quantile":
        ends = torch.quantile(entries[:: -(-len(entries) // 2**23)], torch.tensor([1 - QUANTILE, QUANTILE]))
        return min(float(ends[0]), 0.0), max(float(ends[1]), 0.0)
    return min(float(entries.min()), 0.0), max(float(entries.max()), 0.0)


def _filled(low: Tensor, high: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(seen.any()):
        return low, high
    places = torch.arange(len(low))
    known = places[seen]
    nearest = known[(places[:, None] - known).abs().argmin(dim=1)]
    return low[nearest], high[nearest]


def _rows(sample: Tensor) -> Tensor:
    """Which rows a search looks at: all, or evenly spaced ones."""
    count = max(1, min(len(sample), ENTRIES // max(1, sample.shape[1])))
    return torch.arange(count) * len(sample) // count


def _error_table(sample: Tensor, bits: int, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of each row on each range: float64[m, lows, highs], and the ends float32[lows], float32[highs].

    Symmetric codes have one entry of lows, zero, and ranges [-high, high].
    """
    x = sample.float().cpu()
    low, high = _extent(x.flatten(), "absmax")
    fractions = _SHRINK[asymmetric] ** torch.arange(_TRIED[asymmetric])
    if asymmetric:
        lows, highs = (
            low * fractions if low < 0 else torch.zeros(1),
            high * fractions if high > 0 else torch.zeros(1),
        )
    else:
        lows, highs = torch.zeros(1), max(high, -low) * fractions
    errors = torch.empty(len(x), len(lows), len(highs), dtype=torch.float64)
    for i, below in enumerate(lows):
        for j, above in enumerate(highs):
            if asymmetric:
                step = ((above - below) / (2**bits - 1)).clamp_min(_TINY)
                bottom = (below / step).round()
                q = (x / step).round_().clamp_(float(bottom), float(bottom) + 2**bits - 1)
            else:
                step = (above / (2 ** (bits - 1) - 1)).clamp_min(_TINY)
                q = (x / step).round_().clamp_(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
            errors[:, i, j] = q.mul_(step).sub_(x).square_().sum(dim=1)
    return errors, lows, highs


def _sines(t: Tensor, steps: int) -> Tensor:
    """float64[len(t), 7]: t / steps and three octaves of sine and cosine; more would follow single rows."""
    phase = t.double()[:, None] / steps
    angle = phase * math.pi * 2.0 ** torch.arange(3)
    return torch.cat((phase, angle.sin(), angle.cos()), dim=1)


def _place(features: Tensor, parameters: list[Tensor], first: tuple[int, int]) -> Tensor:
    """Where on the grids of lows and highs each time lies, float64[m, 2]."""
    hidden, hidden_bias, out, bias = parameters
    return torch.tanh(features @ hidden + hidden_bias) @ out + bias + torch.tensor(first, dtype=torch.float64)


def _interpolated(errors: Tensor, places: Tensor) -> Tensor:
    """Bilinear in the table of each row, float64[m]; beyond the grid its border counts."""
    rows = torch.arange(len(errors))
    corners, shares = [], []
    for axis in (0, 1):
        place = places[:, axis].clamp(0, errors.shape[1 + axis] - 1)
        corner = place.detach().floor().clamp_max(max(errors.shape[1 + axis] - 2, 0)).long()
        corners.append((corner, (corner + 1).clamp_max(errors.shape[1 + axis] - 1)))
        shares.append((1 - (place - corner), place - corner))
    total = torch.zeros(len(errors), dtype=torch.float64)
    for i in (0, 1):
        for j in (0, 1):
            total = total + shares[0][i] * shares[1][j] * errors[rows, corners[0][i], corners[1][j]]
    return total


def _between(ends: Tensor, place: Tensor) -> Tensor:
    """float32: the grid's value at a place between its entries."""
    place = place.clamp(0, len(ends) - 1)
    corner = place.floor().clamp_max(max(len(ends) - 2, 0)).long()
    share = (place - corner).float()
    return ends[corner] * (1 - share) + ends[(corner + 1).clamp_max(len(ends) - 1)] * share
