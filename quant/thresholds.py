"""Outlier thresholds of activations from weights alone, without data.

Guarantees: `layernorm_bound`, `relu_bound` and the outlier count behind `k_sigma` hold for every token that comes out
of the given LayerNorm, not on average.
Knows nothing of: which Linear is fed by which LayerNorm; where no closed form holds, QuantLinear takes the
threshold of each token from its root mean square.

The LayerNorm gives x_j = gamma_j z_j + beta_j with sum z = 0 and sum z^2 <= d, d = len(gamma).
Source: notes/method.md 2; the bounds follow from those two equations.
"""

import math

import torch
from torch import Tensor


def layernorm_bound(gamma: Tensor, beta: Tensor) -> Tensor:
    """float[d]: |x_j| never exceeds |beta_j| + |gamma_j| sqrt(d - 1)."""
    return beta.abs() + gamma.abs() * math.sqrt(gamma.numel() - 1)


def k_sigma(gamma: Tensor, beta: Tensor, k: float) -> Tensor:
    """float[d]: tau_j = |beta_j| + k |gamma_j|; no token has more than `outlier_limit(d, k)` above it."""
    return beta.abs() + k * gamma.abs()


def outlier_limit(d: int, k: float) -> int:
    """Largest number of |z_j| > k in one token: m outliers need m k^2 < sum z^2 <= d."""
    return max(0, math.ceil(d / (k * k)) - 1)


def relu_bound(w1: Tensor, b1: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """float[hidden]: ReLU(w1 x + b1) never exceeds it, for any token x from the LayerNorm.

    With u = w1_i * gamma the unit is u . z + w1_i . beta + b1_i, and since sum z = 0 and |z|^2 <= d it is at most
    |u - mean(u)| sqrt(d) above its mean (Cauchy-Schwarz).
    """
    wide = w1.double()
    mean = wide @ beta.double() + b1.double()
    u = wide * gamma.double()
    reach = (u - u.mean(dim=1, keepdim=True)).norm(dim=1) * math.sqrt(u.shape[1])
    return torch.clamp(mean + reach, min=0.0).to(w1.dtype)
