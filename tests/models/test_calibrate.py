"""Run: .venv/bin/python -m pytest tests/models/test_calibrate.py -q"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdgdm.models.calibrate import calibrate, visits
from bitdgdm.models.digress import GraphTransformer, build, quantizable
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.divergence import own_states
from bitdgdm.models.engine import TorchEngine
from bitdgdm.models.features import network_input
from bitdgdm.models.noise import steps as times_of
from bitdgdm.models.source import SourceModel, source_model
from bitdgdm.models.trajectory import walk

TINY = replace(
    QM9_NO_H,
    n_layers=2,
    diffusion_steps=20,
    n_nodes=(0.0, 0.1, 0.1, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05),
    hidden_mlp_dims=Dims(X=16, E=12, y=12),
    hidden_dims=HiddenDims(dx=16, de=8, dy=8, n_head=4, dim_ffX=16, dim_ffE=8, dim_ffy=24),
)
NAMES = quantizable(TINY)


@pytest.fixture(scope="module")
def model() -> SourceModel:
    torch.manual_seed(1)
    return source_model(TINY, GraphTransformer(TINY).state_dict(), "tiny")


def all_rows(model: SourceModel, name: str, molecules: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Every real row of one Linear's input and its time, graph by graph, from states that were kept whole."""
    net = build(model.config, model.weights)
    seen: list[Tensor] = []
    net.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    rows, times = [], []
    for s in own_states(TorchEngine(build(model.config, model.weights), TINY), TINY, molecules, steps, seed):
        seen.clear()
        time = torch.full((len(s),), s.t / TINY.diffusion_steps)
        with torch.no_grad():
            net(*network_input(s.X, s.E, time, s.mask, TINY), s.mask)
        for x, n in zip(seen[0], s.mask.sum(1).tolist(), strict=True):
            real = x if x.ndim == 1 else x[:n] if x.ndim == 2 else x[:n, :n]
            real = real.reshape(-1, x.shape[-1])
            rows.append(real)
            times.append(torch.full((len(real),), s.t))
    return torch.cat(rows), torch.cat(times)


@pytest.mark.parametrize("name", ["self_attn.q", "self_attn.e_out", "linE2", "self_attn.x_y.lin", "lin_y2"])
def test_statistics_equal_those_of_every_real_row_gathered_one_by_one(model: SourceModel, name: str) -> None:
    name = f"tf_layers.0.{name}"
    found = calibrate(model, [name], molecules=10, steps=6, seed=3)[name]
    rows, times = all_rows(model, name, 10, 6, 3)
    wide = rows.double()
    assert found.rows == len(rows) and found.diffusion_steps == 20
    torch.testing.assert_close(found.second_moment.double(), wide.T @ wide / len(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.absmax, rows.abs().amax(0), rtol=1e-6, atol=1e-6)
    assert len(found.sample) == min(1024, len(rows)) == len(found.time)
    distance = torch.cdist(found.sample.double(), wide, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.argmin(1)
    assert distance.amin(1).max() < 1e-5
    at_same_time = torch.where(times[None] == found.time[:, None], distance, torch.inf)
    assert at_same_time.amin(1).max() < 1e-5
    if len(rows) <= 1024:
        assert sorted(found.time.tolist()) == sorted(times.tolist())
    elif name.endswith("e_out"):
        assert nearest.unique().numel() > 900  # drawn without repetition


def test_molecules_beyond_those_that_run_together_count_and_what_fills_up_does_not(
    model: SourceModel,
) -> None:
    name = "tf_layers.1.self_attn.e_add"
    found = calibrate(model, [name], molecules=70, steps=3)[name]
    rows, _ = all_rows(model, name, 70, 3, 0)
    wide = rows.double()
    assert found.rows == len(rows)
    torch.testing.assert_close(found.second_moment.double(), wide.T @ wide / len(rows), rtol=1e-5, atol=1e-6)


def test_the_sample_is_uniform_over_rows_and_the_same_for_one_seed(model: SourceModel) -> None:
    name = "tf_layers.0.self_attn.e_out"
    a = calibrate(model, [name], molecules=60, steps=10, seed=5)[name]
    b = calibrate(model, [name], molecules=60, steps=10, seed=5)[name]
    assert torch.equal(a.sample, b.sample) and torch.equal(a.second_moment, b.second_moment)
    counts = np.bincount(a.time.numpy(), minlength=21)[list(times_of(20, 10)[:-1])]
    assert counts.sum() == 1024
    assert (np.abs(counts - 102.4) < 5 * np.sqrt(102.4)).all()  # every step shows the same rows


def test_linears_that_read_one_tensor_share_their_statistics_and_others_do_not(model: SourceModel) -> None:
    found = calibrate(model, NAMES, molecules=4, steps=3)
    assert set(found) == set(NAMES)
    at = "tf_layers.1."
    q, k, v = (found[f"{at}self_attn.{name}"] for name in "qkv")
    assert q is k is v
    assert found[f"{at}self_attn.e_add"] is found[f"{at}self_attn.e_mul"]
    assert found[f"{at}self_attn.y_e_add"] is found[f"{at}self_attn.y_x_mul"]
    distinct = {id(s) for name, s in found.items() if name.startswith(at)}
    # q k v, e_add e_mul, y_*, x_out, e_out, linX1, linX2, linE1, linE2
    assert len(distinct) == 9
    weight = model.weights[f"{at}self_attn.e_out.weight"]
    assert found[f"{at}self_attn.e_out"].width == weight.shape[1]


def test_statistics_are_ordinary_tensors_that_autograd_may_use(model: SourceModel) -> None:
    found = calibrate(model, NAMES[:1], molecules=4, steps=3)[NAMES[0]]
    w = torch.ones(found.width, requires_grad=True)
    ((found.sample * w).square().sum() + (found.second_moment @ w * found.absmax).sum()).backward()
    assert w.grad is not None and w.grad.isfinite().all()


def test_skewed_times_follow_the_cut_normal_and_every_molecule_counts_equally() -> None:
    counts = visits(500, 400, 50, seed=2, choice="skewed")
    assert counts.sum() == 400 * 50 and (counts.sum(0) == 50).all()
    times = np.array(times_of(500, 50)[:-1])
    t = np.arange(1, 501)
    density = np.exp(-(((t - 200) / 250) ** 2) / 2)
    expected = np.array([density[np.abs(t[:, None] - times).argmin(1) == k].sum() for k in range(50)])
    expected *= 20000 / expected.sum()
    assert (np.abs(counts.sum(1).numpy() - expected) < 6 * np.sqrt(expected) + 8).all()


def test_skewed_statistics_count_states_as_often_as_they_were_drawn(model: SourceModel) -> None:
    name = "tf_layers.1.self_attn.y_x_add"
    counts = visits(20, 12, 5, seed=4, choice="skewed")
    found = calibrate(model, [name], molecules=12, steps=5, seed=4, choice="skewed")[name]
    rows, _ = all_rows(model, name, 12, 5, 4)  # step after step, one row a molecule
    wide = rows.double().repeat_interleave(counts.flatten(), dim=0)
    assert found.rows == 60 == len(wide)
    torch.testing.assert_close(found.second_moment.double(), wide.T @ wide / 60, rtol=1e-5, atol=1e-6)


def test_an_unknown_choice_and_an_empty_pass_are_refused_and_progress_reaches_one(model: SourceModel) -> None:
    with pytest.raises(ValueError, match="uniform, skewed, not 'late'"):
        calibrate(model, NAMES[:1], choice="late")
    with pytest.raises(ValueError, match="a trajectory needs"):
        walk(model, NAMES, lambda *_: None, molecules=0)
    with pytest.raises(ValueError, match="counts has shape"):
        walk(model, NAMES, lambda *_: None, molecules=3, steps=4, counts=torch.ones(4, 2, dtype=torch.int64))
    told: list[float] = []
    calibrate(model, NAMES[:1], molecules=70, steps=4, progress=told.append)
    assert told == sorted(told) and told[-1] == 1.0 and len(told) == 8
