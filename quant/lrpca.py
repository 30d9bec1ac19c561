"""Split matrices into a low-rank and an alpha-sparse part by Learned RPCA: scaled descent with soft
thresholds.

Guarantees: every returned S has at most `budget(alpha, d)` non-zeros in each row and column of length d; a
matrix doesn't feel its companions in the batch; never worse than the truncated SVD of W - T_alpha(W).
Knows nothing of: quantization, and how a schedule was trained (benchmarks/train_lrpca.py). Works in the
dtype and on the device of its input.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitdgdm.quant.robust_pca import LowRankSparse, polish, times_inverse, truncated_svd, without_sparse

TRAINED = Path(__file__).with_name("lrpca_schedule.json")


@dataclass(frozen=True)
class Schedule:
    """Thresholds zeta_0 .. zeta_K in units of the mean |W| of a matrix, and steps eta_1 .. eta_K.

    The unit is the mean because a few large outliers barely move it, while they would set the maximum.
    """

    zeta: tuple[float, ...]
    eta: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.zeta) != len(self.eta) + 1 or min(self.zeta, default=0.0) < 0.0:
            raise ValueError("a schedule has one threshold more than steps, none of them negative")


def geometric(steps: int = 40, *, first: float = 6.0, ratio: float = 0.7, eta: float = 0.5) -> Schedule:
    """zeta_k = first * ratio^k, which needs no data: the theory wants zeta_k to fall as the error does.

    first: at least the largest entry of the low-rank part, about 6 times its mean if its entries are
    Gaussian.
    """
    return Schedule(tuple(first * ratio**k for k in range(steps + 1)), (eta,) * steps)


@cache
def trained() -> Schedule:
    """The shipped schedule; the file says how it was made."""
    values = json.loads(TRAINED.read_text())
    return Schedule(tuple(values["zeta"]), tuple(values["eta"]))


def learned_rpca(w: Tensor, rank: int, alpha: float, *, schedule: Schedule | None = None) -> LowRankSparse:
    """Run the steps of `schedule` (by default `geometric()`), then impose alpha.

    w: float[B, out, in], finite. A step costs three thin products and no selection, so it is the cheapest of
    the solvers. Soft thresholds shrink S and don't bound its density: `polish` selects and refits.
    Source: Cai, Liu, Yin, NeurIPS 2021, algorithm 1 and theorem 1.
    """
    if alpha <= 0.0:
        return without_sparse(w, rank)
    plan = geometric() if schedule is None else schedule
    unit = w.abs().double().mean(dim=(-2, -1))[:, None, None].to(w.dtype)
    left, right = truncated_svd(_beyond(w, plan.zeta[0] * unit), rank)
    if rank > 0:
        for zeta, eta in zip(plan.zeta[1:], plan.eta, strict=True):
            left, right = step(w, left, right, zeta * unit, eta)
    taken = torch.full((w.shape[0],), len(plan.eta), dtype=torch.int64, device=w.device)
    return polish(w, left, right, alpha, taken)


def step(w: Tensor, left: Tensor, right: Tensor, level: Tensor, eta: Tensor | float) -> tuple[Tensor, Tensor]:
    """One step; differentiable in `level` [B, 1, 1] and `eta`, which is how a schedule is trained."""
    d = -_beyond(w - left @ right.mT, level)
    return (
        left - eta * times_inverse(d @ right, right),  # both factors from the old values
        right - eta * times_inverse(d.mT @ left, left),
    )


def _beyond(a: Tensor, level: Tensor) -> Tensor:
    """`a` less its soft threshold, sign(a) max(|a| - level, 0): `a` clipped to +-level."""
    return torch.maximum(torch.minimum(a, level), -level)
