"""Run: .venv/bin/python -m pytest tests/models/test_divergence.py -q"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdgdm.models.digress import GraphTransformer
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.divergence import (
    States,
    divergence,
    held_out_states,
    noised,
    one_hot_states,
    own_states,
    own_trajectory,
    predict,
)
from bitdgdm.models.engine import TorchEngine
from bitdgdm.models.held_out import held_out
from bitdgdm.models.noise import cosine_schedule, steps
from bitdgdm.models.sampler import Graphs, sample_micro_batch

TINY = replace(
    QM9_NO_H,
    n_layers=1,
    diffusion_steps=20,
    hidden_mlp_dims=Dims(X=16, E=12, y=12),
    hidden_dims=HiddenDims(dx=16, de=8, dy=8, n_head=4, dim_ffX=16, dim_ffE=8, dim_ffy=16),
)
SOME = ["C", "CC", "C=O", "CC(=O)O", "C1CCC1", "CC#N", "OCC1CO1", "CCCCCCCCC", "FC(F)F", "NC=O"]


class FakeEngine:
    name, config, device, dtype = "fake", TINY, torch.device("cpu"), torch.float32

    def __init__(self, logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._logits = logits

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        assert X.dtype == torch.float32 and t.dtype == torch.int64 and len(set(t.tolist())) == 1
        return self._logits(X, E)


def random_logits(seed: int, scale: float = 1.0) -> FakeEngine:
    g = torch.Generator().manual_seed(seed)

    def logits(X: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
        e = torch.randn(E.shape, generator=g) * scale
        return torch.randn(X.shape, generator=g) * scale, e + e.transpose(1, 2)

    return FakeEngine(logits)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(v - top) for v in row]
    return [w / sum(weights) for w in weights]


def test_means_equal_a_sum_over_real_nodes_and_pairs_written_out() -> None:
    states = held_out_states(TINY, SOME, molecules=10, times=4)
    p, q = predict(random_logits(1), states), predict(random_logits(2), states)
    found = divergence(p, random_logits(2), states)
    sums = dict.fromkeys(("kx", "ke", "tx", "te", "nx", "ne"), 0.0)

    def add(kind: str, a: Tensor, b: Tensor) -> None:
        pa, pb = softmax(a.tolist()), softmax(b.tolist())
        sums["k" + kind] += sum(u * math.log(u / v) for u, v in zip(pa, pb, strict=True))
        sums["t" + kind] += sum(abs(u - v) for u, v in zip(pa, pb, strict=True)) / 2
        sums["n" + kind] += 1

    for k, batch in enumerate(states):
        for b, n in enumerate(batch.mask.sum(1).tolist()):
            for i in range(n):
                add("x", p.X[k][b, i], q.X[k][b, i])
                for j in range(n):
                    if i != j:
                        add("e", p.E[k][b, i, j], q.E[k][b, i, j])
    assert pytest.approx(sums["kx"] / sums["nx"], rel=1e-12) == found.kl_x
    assert pytest.approx(sums["ke"] / sums["ne"], rel=1e-12) == found.kl_e
    assert pytest.approx(sums["tx"] / sums["nx"], rel=1e-12) == found.tv_x
    assert pytest.approx(sums["te"] / sums["ne"], rel=1e-12) == found.tv_e
    assert pytest.approx(found.kl_x + 5 * found.kl_e, rel=1e-14) == found.kl


def test_an_engine_is_no_way_from_itself_and_tiny_differences_are_resolved() -> None:
    states = held_out_states(TINY, SOME, molecules=6, times=2)
    torch.manual_seed(0)
    engine = TorchEngine(GraphTransformer(TINY), TINY)
    same = divergence(engine, engine, states)
    assert (same.kl, same.tv_x, same.tv_e) == (0, 0, 0)
    reference = predict(engine, states)
    shift = 1e-4
    moved = FakeEngine(lambda X, E: (torch.eye(4)[0] * shift + torch.zeros_like(X), torch.zeros_like(E)))
    flat = FakeEngine(lambda X, E: (torch.zeros_like(X), torch.zeros_like(E)))
    # for small shifts KL is half the variance of the shift under the reference: 1/4 * 3/4
    assert pytest.approx(shift**2 / 2 * 3 / 16, rel=1e-3) == divergence(flat, moved, states).kl_x
    assert len(reference.X) == 2


def test_rows_of_times_add_up_to_the_whole_and_the_interval_holds_the_mean() -> None:
    states = held_out_states(TINY, SOME * 8, molecules=80, times=5)
    found = divergence(random_logits(1), random_logits(2, 0.5), states)
    rows = found.rows()
    assert [r["t"] for r in rows] == sorted({s.t for s in states}) and sum(r["molecules"] for r in rows) == 80
    nodes = [int(found.at(int(r["t"])).nodes.sum()) for r in rows]
    assert pytest.approx(np.average([r["KL_X"] for r in rows], weights=nodes), rel=1e-12) == found.kl_x
    low, high = found.interval()
    assert low < found.kl < high and found.interval() == (low, high)


def test_the_interval_of_a_difference_tells_apart_what_two_intervals_do_not() -> None:
    states = held_out_states(TINY, SOME * 8, molecules=80, times=5)
    reference = predict(random_logits(1), states)
    near = predict(random_logits(2), states)

    def shifted(factor: float) -> FakeEngine:
        """The reference moved towards another network by a little more or less."""
        batches = iter(zip(reference.X, reference.E, near.X, near.E, strict=True))

        def logits(X: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
            x, e, other_x, other_e = next(batches)
            return x + factor * (other_x - x), e + factor * (other_e - e)

        return FakeEngine(logits)

    far, less_far = (divergence(reference, shifted(f), states) for f in (0.105, 0.1))
    assert far.interval()[0] < less_far.interval()[1]
    low, high = far.interval_above(less_far)
    assert 0 < low < far.kl - less_far.kl < high
    below = less_far.interval_above(far)
    assert below == pytest.approx((-high, -low))


def test_nan_in_a_prediction_is_seen_and_not_averaged_away() -> None:
    states = held_out_states(TINY, SOME, molecules=6, times=2)
    broken = FakeEngine(lambda X, E: (X * float("nan"), torch.zeros_like(E)))
    assert math.isnan(divergence(random_logits(1), broken, states).kl)


def test_predictions_of_other_states_are_refused() -> None:
    states = held_out_states(TINY, SOME, molecules=6, times=3)
    with pytest.raises(ValueError, match="predictions of 3"):
        divergence(predict(random_logits(1), states), random_logits(2), states[:2])
    with pytest.raises(ValueError, match="0 batches"):
        divergence(random_logits(1), random_logits(2), [])


def test_times_are_spread_evenly_one_a_batch_and_progress_reaches_one() -> None:
    states = held_out_states(QM9_NO_H, SOME * 30, molecules=250, times=50)
    times = [s.t for s in states]
    assert len(set(times)) == 50 and {b - a for a, b in pairwise(times)} == {10}
    assert min(times) <= 10 and max(times) > 490 and {len(s) for s in states} == {5}
    seen: list[float] = []
    predict(random_logits(1), states[:4], seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_states_are_one_hot_masked_symmetric_with_class_0_on_the_diagonal() -> None:
    for s in held_out_states(TINY, SOME, molecules=10, times=4):
        pairs = s.mask[:, :, None] & s.mask[:, None]
        assert torch.equal(s.X.sum(-1), s.mask.float()) and torch.equal(s.E.sum(-1), pairs.float())
        assert torch.equal(s.E, s.E.transpose(1, 2))
        diagonal = s.E.diagonal(dim1=1, dim2=2)
        assert torch.equal(diagonal[:, 0], s.mask.float()) and not diagonal[:, 1:].any()


def test_noise_keeps_a_class_as_often_as_the_schedule_says() -> None:
    one = held_out(TINY, ["FC#CC#CC#CF"], 1)
    count, t = 4000, 9
    many = Graphs(one.n.repeat(count), one.X.repeat(count, 1), one.E.repeat(count, 1, 1))
    noisy = noised(many, t, TINY, seed=4, ids=torch.arange(count))
    keep = cosine_schedule(20).alpha_bar[t]
    n = int(one.n[0])
    for classes, before, marginals in (
        (noisy.X[:, :n], one.X[0, :n], TINY.node_marginals),
        (noisy.E[:, :n, :n], one.E[0, :n, :n], TINY.edge_marginals),
    ):
        for place in np.ndindex(*before.shape):
            if len(place) == 2 and place[0] == place[1]:
                continue
            x0 = int(before[place])
            expected = (1 - keep) * np.array(marginals) + keep * (np.arange(len(marginals)) == x0)
            found = np.bincount(classes[(slice(None), *place)], minlength=len(marginals)) / count
            spread = np.sqrt(expected * (1 - expected) / count)
            assert (np.abs(found - expected) <= 5 * spread + 1e-12).all()
    assert torch.equal(noisy.E, noisy.E.mT) and not noisy.E.diagonal(dim1=1, dim2=2).any()
    again = noised(many[5:9], t, TINY, seed=4, ids=torch.arange(5, 9))
    assert torch.equal(again.X, noisy.X[5:9]) and torch.equal(again.E, noisy.E[5:9])


def test_own_states_are_what_the_sampler_shows_the_network_and_lead_to_its_graphs() -> None:
    torch.manual_seed(0)
    engine = TorchEngine(GraphTransformer(TINY), TINY)
    states = own_states(engine, TINY, molecules=5, steps=4, seed=9)
    assert tuple(s.t for s in states) == steps(20, 4)[:-1]
    drawn = sample_micro_batch(engine, TINY, 9, 0, 5, 4)
    assert all(torch.equal(s.mask.sum(1), drawn.n) for s in states)
    diagonals = [s.E.diagonal(dim1=1, dim2=2).sum() for s in states]
    assert diagonals[0] == 0 and all(d == drawn.n.sum() for d in diagonals[1:])
    again = predict(engine, states)
    with_predictions, predicted = own_trajectory(engine, TINY, 5, 4, seed=9)
    assert all(torch.equal(a.E, b.E) for a, b in zip(states, with_predictions, strict=True))
    for ours, theirs in ((again.X, predicted.X), (again.E, predicted.E)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    x, e = engine.logits(states[2].X, states[2].E, torch.full((5,), states[2].t), states[2].mask)
    assert torch.equal(again.X[2], x) and torch.equal(again.E[2], e)


def test_states_of_graphs_hold_their_classes() -> None:
    graphs = held_out(TINY, SOME, 10)
    s = one_hot_states(graphs, 7, TINY)
    assert isinstance(s, States) and s.t == 7
    assert torch.equal(s.X.argmax(-1), graphs.X.long()) and torch.equal(s.E.argmax(-1), graphs.E.long())
