"""Run: .venv/bin/python -m pytest tests/models/test_noise.py -q"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.models.noise import Schedule, cosine_schedule, posterior, posterior_table, steps, transition

NODE = np.array([0.7230, 0.1151, 0.1593, 0.0026])
EDGE = np.array([0.7261, 0.2384, 0.0274, 0.0081, 0.0])


def published_schedule(total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(betas, alpha_bar) in float32, in the order of operations of the published code."""
    x = np.linspace(0, total + 2, total + 2)
    f = np.cos(0.5 * np.pi * ((x / (total + 2)) + 0.008) / 1.008) ** 2
    f = f / f[0]
    betas = torch.from_numpy(1 - f[1:] / f[:-1]).float()
    return betas, torch.exp(torch.cumsum(torch.log(1 - torch.clamp(betas, 0, 0.9999)), 0))


def brute_posterior(
    schedule: Schedule, m: np.ndarray, p0: np.ndarray, z_t: int, t: int, s: int
) -> np.ndarray:
    """sum over x_0 of p0 * (z_t Q^T) * (x_0 Qbar_s) / (x_0 Qbar_t z_t^T), entry by entry."""
    q = np.eye(len(m))
    for k in range(s + 1, t + 1):
        q = q @ transition(schedule.keep[k], m)
    bar_s, bar_t = transition(schedule.alpha_bar[s], m), transition(schedule.alpha_bar[t], m)
    out = np.zeros(len(m))
    for x0 in range(len(m)):
        for z_s in range(len(m)):
            out[z_s] += p0[x0] * q[z_s, z_t] * bar_s[x0, z_s] / (bar_t[x0, z_t] or 1e-6)
    return out


@pytest.mark.parametrize("total", [2, 50, 500, 1000])
def test_the_schedule_is_the_published_one(total: int) -> None:
    betas, alpha_bar = published_schedule(total)
    ours = cosine_schedule(total)
    assert ours.alpha_bar.shape == ours.keep.shape == (total + 1,)
    np.testing.assert_allclose(1 - ours.keep, betas.double(), atol=1e-7)
    np.testing.assert_allclose(ours.alpha_bar, alpha_bar.double(), atol=2e-5)


def test_the_schedule_falls_from_nearly_one_to_nearly_zero() -> None:
    alpha_bar = cosine_schedule(500).alpha_bar
    assert (np.diff(alpha_bar) < 0).all()
    assert 0.999 < alpha_bar[0] < 1
    assert 0 < alpha_bar[-1] < 1e-8


@pytest.mark.parametrize("marginals", [NODE, EDGE])
def test_the_closed_form_of_q_bar_is_the_product_of_the_steps(marginals: np.ndarray) -> None:
    schedule = cosine_schedule(60)
    product = transition(schedule.keep[0], marginals)
    for t in range(1, 60):  # at T the published alpha-bar is clipped, the step is not
        product = product @ transition(schedule.keep[t], marginals)
        closed = transition(schedule.alpha_bar[t], marginals)
        np.testing.assert_allclose(product, closed, rtol=1e-9, atol=1e-15)


@given(
    data=st.data(),
    marginals=st.sampled_from([NODE, EDGE]),
    total=st.sampled_from([5, 40]),
)
def test_the_posterior_of_any_stride_agrees_with_the_formula_entry_by_entry(
    data: st.DataObject, marginals: np.ndarray, total: int
) -> None:
    t = data.draw(st.integers(1, total))
    s = data.draw(st.integers(0, t - 1))
    z_t = data.draw(st.integers(0, len(marginals) - 1))
    p0 = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=len(marginals), max_size=len(marginals))))
    p0 /= p0.sum()
    schedule = cosine_schedule(total)
    table = torch.from_numpy(posterior_table(schedule, marginals, t, s))
    ours = posterior(torch.from_numpy(p0), torch.tensor(z_t), table)
    expected = brute_posterior(schedule, marginals, p0, z_t, t, s)
    expected = expected if expected.any() else np.full_like(p0, 1e-5)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("marginals", [NODE, EDGE])
def test_one_step_is_the_published_float32_step(marginals: np.ndarray) -> None:
    total, m = 500, torch.from_numpy(marginals).float()
    betas, alpha_bar = published_schedule(total)
    p0 = torch.softmax(torch.randn(64, len(m), generator=torch.Generator().manual_seed(1)), -1)
    z_t = torch.arange(64) % int((m > 0).sum())
    for t in (500, 499, 250, 2, 1):
        q_t = (1 - betas[t]) * torch.eye(len(m)) + betas[t] * m
        bar_t = alpha_bar[t] * torch.eye(len(m)) + (1 - alpha_bar[t]) * m
        bar_s = alpha_bar[t - 1] * torch.eye(len(m)) + (1 - alpha_bar[t - 1]) * m
        one_hot = torch.eye(len(m))[z_t]
        joint = (one_hot @ q_t.T)[:, None, :] * bar_s[None] / (one_hot @ bar_t.T)[:, :, None]
        published = (p0[:, :, None] * joint).sum(1)
        table = torch.from_numpy(posterior_table(cosine_schedule(total), marginals, t, t - 1))
        ours = posterior(p0, z_t, table.float())
        ours, published = ours / ours.sum(-1, keepdim=True), published / published.sum(-1, keepdim=True)
        # at small t the published float32 betas (1e-5 and less) have few digits left
        torch.testing.assert_close(ours, published, atol=1e-4, rtol=0)


def test_the_posterior_given_the_truth_sums_to_one() -> None:
    schedule = cosine_schedule(100)
    for t, s in [(1, 0), (60, 59), (99, 3)]:
        np.testing.assert_allclose(posterior_table(schedule, NODE, t, s).sum(-1), 1, atol=1e-12)


def test_a_state_of_probability_zero_gets_finite_weights() -> None:
    table = posterior_table(cosine_schedule(100), EDGE, 100, 99)
    assert np.isfinite(table).all()
    only_single = torch.tensor([0.0, 1.0, 0, 0, 0], dtype=torch.float64)
    impossible = posterior(only_single, torch.tensor(4), torch.from_numpy(table))
    assert torch.isfinite(impossible).all() and (impossible > 0).any()


def test_a_row_without_probability_becomes_uniform() -> None:
    out = posterior(torch.zeros(2, 4), torch.tensor([0, 1]), torch.ones(4, 4, 4))
    assert torch.equal(out, torch.full((2, 4), 1e-5))


@given(total=st.integers(2, 1200), data=st.data())
def test_steps_run_from_t_to_zero_strictly_decreasing_and_even(total: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(2, total))
    times = steps(total, n)
    strides = -np.diff(times)
    assert times[0] == total and times[-1] == 0 and len(times) == n + 1
    assert strides.min() >= 1 and strides.max() - strides.min() <= 1


def test_as_many_steps_as_times_is_the_published_sampler() -> None:
    assert steps(500, 500) == tuple(range(500, -1, -1))


@pytest.mark.parametrize("n", [-1, 0, 1, 501])
def test_a_number_of_steps_outside_the_schedule_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="from 2 to 500"):
        steps(500, n)


@pytest.mark.parametrize(("t", "s"), [(3, 3), (2, 3), (101, 0), (1, -1)])
def test_a_step_that_does_not_go_back_in_time_is_refused(t: int, s: int) -> None:
    with pytest.raises(ValueError, match="s < t"):
        posterior_table(cosine_schedule(100), NODE, t, s)
