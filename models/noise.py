"""The discrete diffusion of DiGress: cosine schedule, marginal transitions, posterior, strides.

Guarantees: the numbers of the published code, computed in float64 and rounded once, so that the tables are
the same on every machine; any stride s < t uses the closed form of Q-bar and equals the published step for
s = t - 1.
Knows nothing of: networks, random numbers, graphs; X and E use the same functions.

The published alpha-bar of time t is the cosine at t + 1 of T + 1 equal parts, so alpha-bar at 0 is a little
below 1: the last step still carries a trace of noise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BETA_MAX = 0.9999
_ZERO_DENOMINATOR = 1e-6
_ZERO_ROW = 1e-5
_OFFSET = 0.008


@dataclass(frozen=True)
class Schedule:
    """alpha_bar: float64[T + 1], what is left of x_0 at time t; keep: float64[T + 1], of z_{t-1} at time t.

    alpha_bar is the product of the clipped `keep`; the step itself is not clipped (as in the published code),
    so the last forward step forgets z_{T-1} altogether.
    """

    steps: int
    alpha_bar: NDArray[np.float64]
    keep: NDArray[np.float64]


def cosine_schedule(steps: int) -> Schedule:
    """Return the published discrete cosine schedule for T = steps.

    Source: cvignac/DiGress, src/diffusion/noise_schedule.py (PredefinedNoiseScheduleDiscrete, "cosine").
    """
    x = np.linspace(0, steps + 2, steps + 2) / (steps + 2)
    f = np.cos(0.5 * np.pi * (x + _OFFSET) / (1 + _OFFSET)) ** 2
    keep = f[1:] / f[:-1]
    alpha_bar = np.cumprod(1 - np.clip(1 - keep, 0, _BETA_MAX))
    return Schedule(steps, alpha_bar, keep)


def transition(keep: float, marginals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Q: float64[K, K] = keep * I + (1 - keep) * 1 m^T, rows from, columns to."""
    return keep * np.eye(len(marginals)) + (1 - keep) * marginals[None, :]


def posterior_table(
    schedule: Schedule, marginals: NDArray[np.float64], t: int, s: int
) -> NDArray[np.float64]:
    """Return float64[z_t, x_0, z_s]: q(z_s, z_t | x_0) / q(z_t | x_0) for 0 <= s < t <= T.

    A pair (x_0, z_t) of probability 0 gets the published denominator 1e-6.
    Raises: ValueError if s and t are not in order.
    """
    if not 0 <= s < t <= schedule.steps:
        raise ValueError(f"a step goes from t to s with 0 <= s < t <= {schedule.steps}, not from {t} to {s}")
    q_step = transition(float(np.prod(schedule.keep[s + 1 : t + 1])), marginals)
    q_bar_s = transition(float(schedule.alpha_bar[s]), marginals)
    q_bar_t = transition(float(schedule.alpha_bar[t]), marginals)
    numerator = q_step.T[:, None, :] * q_bar_s[None, :, :]
    denominator = np.where(q_bar_t == 0, _ZERO_DENOMINATOR, q_bar_t)
    return numerator / denominator.T[:, :, None]


def posterior(p0: Tensor, z_t: Tensor, table: Tensor) -> Tensor:
    """Return unnormalised p(z_s | z_t): float32[..., K] = sum over x_0 of p0(x_0) * table[z_t, x_0].

    p0: float32[..., K], the network's prediction of x_0. z_t: int64[...]. table: float32[K, K, K].
    A row without any probability becomes uniform, as published.
    """
    weights = table[z_t]
    total = p0[..., 0, None] * weights[..., 0, :]
    for x0 in range(1, p0.shape[-1]):  # one after the other: the order of a sum is part of law L1
        total = total + p0[..., x0, None] * weights[..., x0, :]
    return torch.where((total == 0).all(-1, keepdim=True), _ZERO_ROW, total)


def steps(total: int, n_steps: int) -> tuple[int, ...]:
    """Return n_steps + 1 times from `total` down to 0, evenly spread, strictly decreasing.

    n_steps = total gives every time, which is the published sampler.
    Raises: ValueError unless 2 <= n_steps <= total.
    """
    if not 2 <= n_steps <= total:
        raise ValueError(f"the number of steps must be from 2 to {total}, not {n_steps}")
    return tuple((total * (n_steps - k) + n_steps // 2) // n_steps for k in range(n_steps + 1))
