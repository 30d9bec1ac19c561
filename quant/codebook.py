"""Weights as indices into a small book of values per row (SqueezeLLM).

Guarantees: the weighted squared error of a row is never above that of rounding to nearest whose levels are stored in
the same bfloat16; books are sorted; every code is the nearest value of its book, ties to the smaller one. No random
numbers: the same weights give the same book.
Knows nothing of: activations (a codebook has no integer product, so its inputs stay in 16 bit) and of the sparse part.
A book needn't hold zero: where a sparse part replaces an entry, its value is that entry less the one the code names.

Source: Kim et al., "SqueezeLLM", ICML 2024, equation 4; SqueezeAILab/SqueezeLLM at 0699e18 (quantization/nuq.py) runs
k-means on each row, weighted by the squared gradient of the loss.
Adaptation: the weight of an entry is the mean square of its input channel on self-sampled trajectories, the part of
that gradient that a layer knows by itself. Cost: 16 2^bits bits a row, 1 stored bit a weight for 4 bits and 256
inputs; weight only, no faster product.
"""

import torch
from torch import Tensor

from bitdgdm.quant.gptq import row_scales

ITERATIONS = 50

ATOMS = 64
"""Runs of sorted values among which the starting clusters are found exactly."""

ROWS = 256
"""Rows worked on at a time, to bound the memory."""


def kmeans_rows(
    w: Tensor, bits: int, weight_of: Tensor | None = None, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Cluster each row's values into 2^bits.

    w: float[..., out, in]; weight_of: float[..., in] or [..., out, in], not negative, None for equal weights; a row
    whose weights are all zero counts as equally weighted.
    Returns codes uint8[..., out, in] and book bfloat16[..., out, 2^bits], w ~ book.gather(-1, codes).
    """
    rows, weight = w.reshape(-1, w.shape[-1]).double(), _row_weights(w, weight_of)
    nearest = _rounding_levels(w, bits)
    pieces = []
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        pieces.append(_cluster(rows[part], weight[part], nearest[part], iterations))
    best = torch.cat(pieces)
    codes = _assign(rows, best).to(torch.uint8)
    return codes.view(w.shape), best.to(torch.bfloat16).view(*w.shape[:-1], 2**bits)


def look_up(codes: Tensor, book: Tensor) -> Tensor:
    """The weights that codes stand for, float32[..., out, in]."""
    return book.float().gather(-1, codes.to(torch.int64))


def _cluster(rows: Tensor, weight: Tensor, nearest: Tensor, iterations: int) -> Tensor:
    """The best sorted book of each row among its rounding levels and two refined ones; values exact in bfloat16."""
    order = rows.argsort(dim=1, stable=True)
    values, weight = rows.gather(1, order).contiguous(), weight.gather(1, order)
    candidates = [nearest, _lloyd(values, weight, nearest, iterations)]
    candidates.append(_lloyd(values, weight, _best_ranges(values, weight, nearest.shape[1]), iterations))
    best, least = nearest, torch.full(rows.shape[:1], torch.inf, dtype=torch.float64, device=rows.device)
    for book in candidates:
        stored = book.to(torch.bfloat16).double()
        error = (weight * (values - stored.gather(1, _assign(values, stored))).square()).sum(dim=1)
        best = torch.where((error < least)[:, None], stored, best)
        least = torch.minimum(error, least)
    return best


def _row_weights(w: Tensor, weight_of: Tensor | None) -> Tensor:
    """float64[rows, in] with sum 1; entries of weight zero still count a little, so that they get sensible codes."""
    if weight_of is None:
        weight_of = torch.ones(w.shape[-1], device=w.device)
    elif weight_of.ndim < w.ndim:
        weight_of = weight_of.unsqueeze(-2)
    weight = weight_of.double().expand(w.shape).reshape(-1, w.shape[-1])
    total = weight.sum(dim=1, keepdim=True)
    even = 1.0 / w.shape[-1]
    weight = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), even)
    return weight + 1e-9 * even


def _rounding_levels(w: Tensor, bits: int) -> Tensor:
    """The levels of `round_weights` with clipping, float64[rows, 2^bits]."""
    scale = row_scales(w, bits, "mse").double().reshape(-1, 1)
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), device=w.device) * scale


def _best_ranges(values: Tensor, weight: Tensor, count: int) -> Tensor:
    """Means of the best `count` ranges of sorted values, float64[rows, count], by dynamic programming.

    Exact up to ATOMS values a row. Longer rows are first cut into ATOMS runs, short ones where values lie apart.
    """
    rows, n = values.shape
    places = torch.arange(n, device=values.device, dtype=torch.float64) / n
    span = (values[:, -1:] - values[:, :1]).clamp_min(1e-300)
    spread_out = (places + (values - values[:, :1]) / span).contiguous()
    cuts = min(n, ATOMS)
    if n <= ATOMS:
        borders = torch.arange(n + 1, device=values.device).expand(rows, -1)
    else:
        wanted = torch.arange(1, cuts, device=values.device, dtype=torch.float64) / cuts * spread_out[:, -1:]
        inner = torch.searchsorted(spread_out, wanted.contiguous())
        borders = torch.nn.functional.pad(torch.nn.functional.pad(inner, (0, 1), value=n), (1, 0))
    centred = values - values.mean(dim=1, keepdim=True)  # the cost is a small difference of sums
    sums = [
        torch.nn.functional.pad(t.cumsum(dim=1), (1, 0))
        for t in (weight, weight * centred, weight * centred**2)
    ]
    w0, w1, w2 = (t.gather(1, borders) for t in sums)
    mass, moment, square = (t[:, None, :] - t[:, :, None] for t in (w0, w1, w2))
    cost = square - moment.square() / torch.where(mass > 0, mass, 1.0)
    ahead = torch.ones(cuts + 1, cuts + 1, dtype=torch.bool, device=values.device).triu()
    cost = torch.where(ahead, cost.clamp_min_(0.0), torch.inf)
    total, starts = cost[:, 0], []
    for _ in range(count - 1):
        total, start = (total[:, :, None] + cost).min(dim=1)
        starts.append(start)
    right = torch.full((rows, 1), cuts, device=values.device)
    ends = [right]
    for start in reversed(starts):
        right = start.gather(1, right)
        ends.append(right)
    edges = torch.cat((torch.zeros_like(right), *reversed(ends)), dim=1)
    mass, moment = w0.gather(1, edges).diff(dim=1), w1.gather(1, edges).diff(dim=1)
    means = torch.where(mass > 0, moment / torch.where(mass > 0, mass, 1.0), 0.0)
    return (means + values.mean(dim=1, keepdim=True)).sort(dim=1).values


def _lloyd(values: Tensor, weight: Tensor, book: Tensor, iterations: int) -> Tensor:
    """Alternate nearest assignment and weighted means; values are sorted, so a cluster is a range of them."""
    zero = torch.zeros(len(values), 1, dtype=torch.float64, device=values.device)
    weights_before = torch.cat((zero, weight.cumsum(dim=1)), dim=1)
    values_before = torch.cat((zero, (weight * values).cumsum(dim=1)), dim=1)
    end = torch.full((len(values), 1), values.shape[1], device=values.device)
    for _ in range(iterations):
        inner = torch.searchsorted(values, ((book[:, 1:] + book[:, :-1]) / 2).contiguous(), right=True)
        borders = torch.cat((torch.zeros_like(end), inner, end), dim=1)
        total = weights_before.gather(1, borders).diff(dim=1)
        moment = values_before.gather(1, borders).diff(dim=1)
        filled = borders.diff(dim=1) > 0
        new = torch.where(filled, moment / torch.where(filled, total, 1.0), book)
        new = new.sort(dim=1).values
        if torch.equal(new, book):
            break
        book = new
    return book


def _assign(values: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest value of a sorted book, int64 like values."""
    return torch.searchsorted(((book[:, 1:] + book[:, :-1]) / 2).contiguous(), values.contiguous())
