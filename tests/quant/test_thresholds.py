"""Run: .venv/bin/python -m pytest tests/quant/test_thresholds.py"""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdgdm.quant.thresholds import k_sigma, layernorm_bound, outlier_limit, relu_bound


@st.composite
def normalised_tokens(draw):
    """A token of any shape, spikes included, through a LayerNorm with any gamma and beta, in float64."""
    d = draw(st.integers(2, 80))
    value = st.floats(-1e6, 1e6)
    token, gamma, beta = (draw(hnp.arrays(np.float64, d, elements=value)) for _ in range(3))
    if draw(st.booleans()):
        token = np.where(np.arange(d) == draw(st.integers(0, d - 1)), token, 0.0)
    token, gamma, beta = (torch.from_numpy(v) for v in (token, gamma, beta))
    return F.layer_norm(token, (d,), gamma, beta), gamma, beta


@given(normalised_tokens())
def test_no_entry_of_any_token_exceeds_the_layernorm_bound(case):
    x, gamma, beta = case
    bound = layernorm_bound(gamma, beta)
    assert bool((x.abs() <= bound * (1 + 1e-9) + 1e-9).all())


@given(normalised_tokens(), st.floats(0.5, 6))
def test_no_token_has_more_entries_beyond_k_sigma_than_the_limit(case, k):
    x, gamma, beta = case
    beyond = x.abs() > k_sigma(gamma, beta, k) * (1 + 1e-9) + 1e-9
    assert int(beyond.sum()) <= outlier_limit(x.numel(), k)


def test_the_bound_and_the_limit_are_reached():
    d = 17
    spike = torch.zeros(d, dtype=torch.float64)
    spike[3] = 1e9
    ones, zeros = torch.ones(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    x = F.layer_norm(spike, (d,), ones, zeros)
    assert float(x.max()) > 0.999 * float(layernorm_bound(ones, zeros).max())
    assert outlier_limit(256, 4) == 15 and outlier_limit(64, 3) == 7 and outlier_limit(8, 3) == 0


@given(normalised_tokens(), st.integers(0, 2**32 - 1))
def test_no_unit_behind_a_relu_exceeds_its_bound_for_any_token(case, seed):
    x, gamma, beta = case
    rng = np.random.default_rng(seed)
    w1, b1 = (torch.from_numpy(rng.standard_normal(s) * 10) for s in ((5, x.numel()), 5))
    hidden = torch.relu(w1 @ x + b1)
    bound = relu_bound(w1, b1, gamma, beta)
    scale = (w1.abs() @ (gamma.abs() * x.numel() ** 0.5 + beta.abs()) + b1.abs()).max()
    assert bool((hidden <= bound + 1e-9 * scale).all())


def test_the_relu_bound_is_reached_by_the_token_that_points_along_the_unit():
    torch.manual_seed(0)
    w1, gamma, beta = torch.randn(1, 32).double(), torch.rand(32).double(), torch.randn(32).double()
    u = (w1 * gamma)[0]
    x = F.layer_norm(1e6 * (u - u.mean()), (32,), gamma, beta)
    b1 = torch.tensor([0.3]).double()
    hidden, bound = torch.relu(w1 @ x + b1), relu_bound(w1, b1, gamma, beta)
    assert float(hidden) > 0.9999 * float(bound) > 0
