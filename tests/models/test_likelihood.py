"""Run: .venv/bin/python -m pytest tests/models/test_likelihood.py -q"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdgdm.models.digress_config import QM9_NO_H, DigressConfig
from bitdgdm.models.engine import load_engine
from bitdgdm.models.held_out import held_out, held_out_smiles
from bitdgdm.models.likelihood import Likelihood, nll_bound
from bitdgdm.models.noise import cosine_schedule
from bitdgdm.models.sampler import Graphs

TOY = replace(
    QM9_NO_H,
    diffusion_steps=3,
    n_pad=2,
    n_nodes=(0.0, 0.3, 0.7),
    node_marginals=(0.5, 0.2, 0.2, 0.1),
    edge_marginals=(0.5, 0.3, 0.1, 0.06, 0.04),
)


class ToyEngine:
    """Logits that depend on everything the network may depend on: both nodes, the edge, the time."""

    name, config, device, dtype = "toy", TOY, torch.device("cpu"), torch.float32

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.node, self.edge = rng.standard_normal((4, 4, 4, 5, 4)), rng.standard_normal((4, 4, 4, 5, 5))

    def table(self, t: int, z: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits of node 0, node 1 and their edge for the state z = (x_0, x_1, e)."""
        a, b, e = z
        return self.node[t, a, b, e], self.node[t, b, a, e], self.edge[t, a, b, e] + self.edge[t, b, a, e]

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        x, e = torch.zeros(X.shape), torch.zeros(E.shape)
        for i, (a, b) in enumerate(X.argmax(-1).tolist()):
            first, second, edge = self.table(int(t[i]), (a, b, int(E[i, 0, 1].argmax())))
            x[i] = torch.from_numpy(np.stack((first, second)))
            e[i, 0, 1] = e[i, 1, 0] = torch.from_numpy(edge)
        return x, e


def softmax(v: np.ndarray) -> np.ndarray:
    w = np.exp(v - v.max())
    return w / w.sum()


def chain(config: DigressConfig, m: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Q_t and Qbar_t for t = 0..T."""
    s = cosine_schedule(config.diffusion_steps)
    one = np.eye(len(m))
    steps = [k * one + (1 - k) * m for k in s.keep]
    return steps, [a * one + (1 - a) * m for a in s.alpha_bar]


MX, ME = np.array(TOY.node_marginals), np.array(TOY.edge_marginals)
STATES = list(itertools.product(range(4), range(4), range(5)))


def exact(engine: ToyEngine, x: tuple[int, int, int], published: bool) -> float:
    """The bound of the graph x of two nodes, by a sum over every state of every time."""
    (sx, bx), (se, be) = chain(TOY, MX), chain(TOY, ME)
    edge_weight = 2 if published else 1
    total = -math.log(TOY.n_nodes[2])
    for x0, bar, m, weight in ((x[0], bx, MX, 1), (x[1], bx, MX, 1), (x[2], be, ME, edge_weight)):
        p, q = (m, bar[3][x0]) if published else (bar[3][x0], m)
        total += weight * float((p * np.log(p / q)).sum())
    for t in range(TOY.diffusion_steps + 1):
        for z in STATES:
            probability = bx[t][x[0], z[0]] * bx[t][x[1], z[1]] * be[t][x[2], z[2]]
            for x0, zt, logits, step, bar, weight in zip(
                x, z, engine.table(t, z), (sx, sx, se), (bx, bx, be), (1, 1, edge_weight), strict=True
            ):
                p0 = softmax(logits)
                if t == 0:
                    total -= probability * weight * math.log(p0[x0])
                    continue
                posteriors = step[t][:, zt] * bar[t - 1] / bar[t][:, zt, None]  # [x_0, z_s]
                true = posteriors[x0] / posteriors[x0].sum()
                p = step[t][:, zt] * (p0 @ bar[t - 1]) if published else p0 @ posteriors
                total += probability * weight * float((true * np.log(true / (p / p.sum()))).sum())
    return total


def marginal(engine: ToyEngine, x: tuple[int, int, int]) -> float:
    """-log p(x) of the model itself: every path from z_T through the sampler's steps to x."""
    (sx, bx), (se, be) = chain(TOY, MX), chain(TOY, ME)
    weight = {z: MX[z[0]] * MX[z[1]] * ME[z[2]] for z in STATES}
    for t in range(TOY.diffusion_steps, 0, -1):
        arrived = dict.fromkeys(STATES, 0.0)
        for z, w in weight.items():
            rows = []
            for zt, logits, step, bar in zip(z, engine.table(t, z), (sx, sx, se), (bx, bx, be), strict=True):
                p = softmax(logits) @ (step[t][:, zt] * bar[t - 1] / bar[t][:, zt, None])
                rows.append(p / p.sum())
            for s in STATES:
                arrived[s] += w * rows[0][s[0]] * rows[1][s[1]] * rows[2][s[2]]
        weight = arrived
    total = 0.0
    for z, w in weight.items():
        total += w * math.prod(softmax(v)[c] for v, c in zip(engine.table(0, z), x, strict=True))
    return -math.log(total * TOY.n_nodes[2])


def copies(x: tuple[int, int, int], count: int) -> Graphs:
    X = torch.tensor([[x[0], x[1]]] * count, dtype=torch.int8)
    E = torch.tensor([[[0, x[2]], [x[2], 0]]] * count, dtype=torch.int8)
    return Graphs(torch.full((count,), 2), X, E)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_the_estimate_of_many_draws_is_the_sum_over_all_times_and_states(times: int) -> None:
    engine, x = ToyEngine(), (1, 3, 2)
    found = nll_bound(engine, TOY, copies(x, 6000), times=times, group=20, seed=7)
    for (mean, error), expected in (
        (found.nll, exact(engine, x, published=False)),
        (found.nll_published, exact(engine, x, published=True)),
    ):
        assert 0 < error < 0.02 * expected
        assert abs(mean - expected) < 4 * error, (mean, error, expected)


def test_the_bound_is_above_the_likelihood_of_the_sampler_itself() -> None:
    for seed, x in ((0, (1, 3, 2)), (1, (0, 0, 0)), (2, (3, 2, 4))):
        engine = ToyEngine(seed)
        assert exact(engine, x, published=False) > marginal(engine, x)


def test_all_parts_but_the_size_are_zero_for_a_network_that_knows_the_answer() -> None:
    x = (1, 3, 2)

    class Oracle(ToyEngine):
        def table(self, t: int, z: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return 60 * np.eye(4)[x[0]], 60 * np.eye(4)[x[1]], 60 * np.eye(5)[x[2]]

    found = nll_bound(Oracle(), TOY, copies(x, 10), times=3)
    assert float(found.diffusion.abs().max()) < 1e-9 and float(found.reconstruction.abs().max()) < 1e-9
    torch.testing.assert_close(found.size, torch.full((10,), -math.log(0.7), dtype=torch.float64))


def test_one_node_has_no_edge_terms_and_padding_costs_nothing() -> None:
    one = Graphs(
        torch.tensor([1]), torch.tensor([[2, 0]], dtype=torch.int8), torch.zeros(1, 2, 2, dtype=torch.int8)
    )
    found = nll_bound(ToyEngine(), TOY, one, times=3)
    assert torch.equal(found.total, found.size + found.prior + found.diffusion + found.reconstruction)
    bar = chain(TOY, MX)[1][3][2]
    assert float(found.prior) == pytest.approx(float((bar * np.log(bar / MX)).sum()), rel=1e-9)
    difference = float(found.published - found.total)
    assert abs(difference) < 5  # no edge is counted twice: only the two forms of p differ


def test_the_standard_error_is_the_spread_of_repeated_estimates() -> None:
    engine = ToyEngine()
    graphs = Graphs.concat([copies((1, 3, 2), 20), copies((0, 0, 0), 20), copies((3, 2, 1), 20)])
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    graphs = Graphs(graphs.n[shuffled], graphs.X[shuffled], graphs.E[shuffled])
    runs = [nll_bound(engine, TOY, graphs, times=1, group=4, seed=s).nll for s in range(30)]
    spread = np.std([mean for mean, _ in runs], ddof=1)
    assert (
        0.7 * spread < np.mean([error for _, error in runs]) < 2 * spread
    )  # the error also counts the molecules


def test_a_group_alone_has_no_standard_error_and_bad_requests_are_refused() -> None:
    found = nll_bound(ToyEngine(), TOY, copies((1, 1, 1), 4), times=3)
    assert isinstance(found, Likelihood) and math.isnan(found.nll[1])
    told: list[float] = []
    nll_bound(ToyEngine(), TOY, copies((1, 1, 1), 6), times=1, group=2, progress=told.append)
    assert told == pytest.approx([1 / 3, 2 / 3, 1])
    for times in (0, 4):
        with pytest.raises(ValueError, match="of 3 times"):
            nll_bound(ToyEngine(), TOY, copies((1, 1, 1), 4), times=times)
    with pytest.raises(ValueError, match="0 molecules"):
        nll_bound(ToyEngine(), TOY, copies((1, 1, 1), 4)[:0], times=1)


def test_the_shipped_network_finds_held_out_molecules_likelier_than_scrambled_ones() -> None:
    engine = load_engine("builtin:digress-qm9", device="cpu")
    graphs = held_out(QM9_NO_H, held_out_smiles(), 48)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    full = graphs.n == 9
    graphs = Graphs(graphs.n[full], graphs.X[full], graphs.E[full])
    scrambled = Graphs(graphs.n, graphs.X[:, order], graphs.E)  # the same atoms on the wrong bonds
    true, false = (nll_bound(engine, QM9_NO_H, g, times=5, group=16) for g in (graphs, scrambled))
    assert true.nll[0] + 10 < false.nll[0]
    assert min(float(v.min()) for v in (true.prior, true.diffusion, true.reconstruction)) > -1e-9
