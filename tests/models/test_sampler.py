"""Run: .venv/bin/python -m pytest tests/models/test_sampler.py -q"""

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdgdm.infra.errors import DeviceMemoryFull, LogitsNotFinite
from bitdgdm.models.digress import GraphTransformer
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.engine import Engine, TorchEngine, load_engine
from bitdgdm.models.noise import cosine_schedule, steps, transition
from bitdgdm.models.philox import philox
from bitdgdm.models.sampler import Graphs, draw, sample_batches, sample_ids, sample_micro_batch
from bitdgdm.models.seam import Chain, LoopEngine

TINY = replace(
    QM9_NO_H,
    n_layers=2,
    diffusion_steps=20,
    hidden_mlp_dims=Dims(X=16, E=12, y=12),
    hidden_dims=HiddenDims(dx=16, de=8, dy=8, n_head=4, dim_ffX=16, dim_ffE=8, dim_ffy=16),
)
SEED = 2**63 + 5


class FakeEngine:
    """Logits from a function of (X, E, t, mask); keeps what it was called with."""

    name, config, device, dtype = "fake", TINY, torch.device("cpu"), torch.float32

    def __init__(self, logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._logits = logits

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append((X, E, t, node_mask))
        return self._logits(X, E)


def no_opinion(X: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(X), torch.zeros_like(E)


def from_marginals(X: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    node, edge = torch.tensor(TINY.node_marginals), torch.tensor(TINY.edge_marginals)
    return node.log().expand_as(X), edge.log().expand_as(E)


@pytest.fixture(scope="module")
def tiny() -> Engine:
    torch.manual_seed(3)
    return TorchEngine(GraphTransformer(TINY), TINY)


@pytest.fixture(scope="module")
def shipped() -> Engine:
    return load_engine("builtin:digress-qm9", device="cpu")


def as_bytes(graphs: Graphs) -> list[bytes]:
    """One entry a graph."""
    fields = zip(graphs.n, graphs.X, graphs.E, strict=True)
    return [b"".join(t.numpy().tobytes() for t in graph) for graph in fields]


def ragged_units(first: int, stop: int, pieces: int) -> list[tuple[int, int]]:
    cuts = sorted(random.Random(11).sample(range(first + 1, stop), pieces - 1))
    return [(a, b - a) for a, b in zip([first, *cuts], [*cuts, stop], strict=True)]


@pytest.mark.parametrize(("engine", "n_steps"), [("tiny", 6), ("shipped", 3)])
def test_rows_are_byte_equal_in_one_unit_in_ragged_units_shuffled_and_alone(
    engine: str, n_steps: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(engine)

    def rows(first_id: int, count: int) -> list[bytes]:
        return as_bytes(sample_ids(model, model.config, SEED, first_id, count, n_steps, 16))

    whole = rows(0, 64)
    assert len(set(whole)) > 32
    units = ragged_units(0, 64, 7)
    random.Random(5).shuffle(units)
    for first, count in units:
        assert rows(first, count) == whole[first : first + count]
    assert rows(41, 1) == whole[41:42]


def test_ids_beyond_32_bits_have_their_own_graphs(tiny: Engine) -> None:
    far = 2**32
    low = as_bytes(sample_ids(tiny, TINY, 1, 0, 8, 5, 8))
    high = as_bytes(sample_ids(tiny, TINY, 1, far, 8, 5, 8))
    assert low != high
    assert as_bytes(sample_ids(tiny, TINY, 1, far + 3, 2, 5, 8)) == high[3:5]


def test_the_number_of_threads_of_the_process_changes_nothing(tiny: Engine) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = as_bytes(sample_ids(tiny, TINY, 1, 0, 32, 5, 32))
        torch.set_num_threads(3)
        assert as_bytes(sample_ids(tiny, TINY, 1, 0, 32, 5, 32)) == one
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_another_seed_and_another_id_give_other_graphs(tiny: Engine) -> None:
    a = as_bytes(sample_ids(tiny, TINY, 1, 0, 32, 5, 32))
    b = as_bytes(sample_ids(tiny, TINY, 2, 0, 32, 5, 32))
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 4


def test_batches_arrive_in_order_and_together_are_the_unit(tiny: Engine) -> None:
    batches = list(sample_batches(tiny, TINY, 1, 5, 30, 4, 8))
    assert [first for first, _ in batches] == [5, 8, 16, 24, 32]
    assert [len(graphs) for _, graphs in batches] == [3, 8, 8, 8, 3]
    whole = as_bytes(sample_ids(tiny, TINY, 1, 5, 30, 4, 8))
    assert [row for _, graphs in batches for row in as_bytes(graphs)] == whole


def test_progress_rises_to_one(tiny: Engine) -> None:
    seen: list[float] = []
    sample_ids(tiny, TINY, 1, 3, 20, 4, 8, on_progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1 and len(seen) == 3 * 4


def one_by_one(engine: Engine, seed: int, size: int, n_steps: int) -> list[tuple[int, list, list]]:
    """The sampler written as loops over molecules, nodes and edges, in float64, from the formulas."""
    c, pad = TINY, TINY.n_pad
    schedule = cosine_schedule(c.diffusion_steps)
    start = c.diffusion_steps

    def uniform(i: int, step: int, slot: int) -> float:
        return float(philox(seed, torch.tensor([i]), step, torch.tensor([slot])))

    def pick(p: np.ndarray, u: float) -> int:
        return int(np.searchsorted(np.cumsum(p / p.sum())[:-1], u))

    def step_back(p0: np.ndarray, z: int, m: tuple[float, ...], t: int, s: int) -> np.ndarray:
        keep = float(np.prod(schedule.keep[s + 1 : t + 1]))
        q = transition(keep, np.array(m))
        bar_s, bar_t = (transition(schedule.alpha_bar[k], np.array(m)) for k in (s, t))
        out = np.zeros(len(m))
        for x0 in range(len(m)):
            out += p0[x0] * q[:, z] * bar_s[x0] / (bar_t[x0, z] or 1e-6)
        return out

    n = [pick(np.array(c.n_nodes), uniform(i, start, pad + pad * pad)) for i in range(size)]
    X, E = np.zeros((size, pad), int), np.zeros((size, pad, pad), int)
    for i in range(size):
        for a in range(n[i]):
            X[i, a] = pick(np.array(c.node_marginals), uniform(i, start, a))
            for b in range(a + 1, n[i]):
                u = uniform(i, start, pad + pad * a + b)
                E[i, a, b] = E[i, b, a] = pick(np.array(c.edge_marginals), u)
    times = steps(start, n_steps)
    for t, s in pairwise(times):
        hot_X = np.zeros((size, pad, 4), np.float32)
        hot_E = np.zeros((size, pad, pad, 5), np.float32)
        mask = np.zeros((size, pad), bool)
        for i in range(size):
            for a in range(n[i]):
                mask[i, a] = True
                hot_X[i, a, X[i, a]] = 1
                for b in range(n[i]):
                    if a != b or t != start:
                        hot_E[i, a, b, E[i, a, b]] = 1
        seen = (torch.from_numpy(hot_X), torch.from_numpy(hot_E), torch.full((size,), t))
        both = engine.logits(*seen, torch.from_numpy(mask))
        p_X, p_E = (logits.double().softmax(-1).numpy() for logits in both)
        for i in range(size):
            for a in range(n[i]):
                X[i, a] = pick(step_back(p_X[i, a], X[i, a], c.node_marginals, t, s), uniform(i, s, a))
                for b in range(a + 1, n[i]):
                    p = step_back(p_E[i, a, b], E[i, a, b], c.edge_marginals, t, s)
                    E[i, a, b] = E[i, b, a] = pick(p, uniform(i, s, pad + pad * a + b))
    return [(n[i], X[i].tolist(), E[i].tolist()) for i in range(size)]


def test_graphs_are_those_of_a_sampler_written_as_plain_loops(tiny: Engine) -> None:
    ours = sample_micro_batch(tiny, TINY, SEED, 0, 4, 7)
    expected = one_by_one(tiny, SEED, 4, 7)
    graphs = zip(ours.n, ours.X, ours.E, strict=True)
    assert expected == [(int(n), x.tolist(), e.tolist()) for n, x, e in graphs]


def test_the_network_sees_one_hot_symmetric_masked_graphs_and_the_published_diagonal() -> None:
    engine = FakeEngine(no_opinion)
    graphs = sample_micro_batch(engine, TINY, 4, 0, 64, 5)
    assert [t.unique().tolist() for _, _, t, _ in engine.calls] == [[20], [16], [12], [8], [4]]
    for call, (X, E, t, mask) in enumerate(engine.calls):
        assert X.dtype == E.dtype == torch.float32 and t.dtype == torch.int64 and t.shape == (64,)
        assert torch.equal(mask.sum(1), graphs.n) and torch.equal(mask, mask.sort(1, descending=True).values)
        assert torch.equal(X.sum(-1), mask.float())
        pairs = (mask[:, :, None] & mask[:, None]).float()
        diagonal = E.diagonal(dim1=1, dim2=2)  # [B, classes, n]
        assert torch.equal(E, E.transpose(1, 2))
        if call == 0:
            assert not diagonal.any()
            assert torch.equal(E.sum(-1), pairs * (1 - torch.eye(9)))
        else:
            assert torch.equal(diagonal[:, 0], mask.float()) and not diagonal[:, 1:].any()
            assert torch.equal(E.sum(-1), pairs)


def test_results_are_symmetric_without_loops_and_zero_beyond_the_nodes() -> None:
    graphs = sample_micro_batch(FakeEngine(no_opinion), TINY, 4, 128, 128, 5)
    mask = torch.arange(9) < graphs.n[:, None]
    assert graphs.n.min() >= 1 and graphs.n.max() <= 9
    assert not graphs.X[~mask].any()
    assert not graphs.E[~(mask[:, :, None] & mask[:, None])].any()
    assert torch.equal(graphs.E, graphs.E.transpose(1, 2))
    assert not graphs.E.diagonal(dim1=1, dim2=2).any()
    assert len(graphs[3:7]) == 4 and torch.equal(graphs[3:7].X, graphs.X[3:7])


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = p / p.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_without_knowledge_the_chain_stays_at_the_marginals_and_the_counts_at_theirs() -> None:
    config = replace(TINY, n_nodes=(0.0, *(1 / 9 for _ in range(9))))
    graphs = sample_ids(FakeEngine(from_marginals), config, 8, 0, 4096, 6, 1024)
    assert chi_square(np.bincount(graphs.n.numpy())[1:], np.ones(9)) < 30  # 8 degrees of freedom
    mask = torch.arange(9) < graphs.n[:, None]
    nodes = np.bincount(graphs.X[mask].numpy(), minlength=4)
    assert chi_square(nodes, np.array(TINY.node_marginals)) < 20  # 3 degrees of freedom
    upper = (mask[:, :, None] & mask[:, None]).triu(1)
    edges = np.bincount(graphs.E[upper].numpy(), minlength=5)
    assert edges[4] == 0
    assert chi_square(edges[:4], np.array(TINY.edge_marginals[:4])) < 20


def test_a_certain_network_is_followed() -> None:
    """z_0 keeps a trace of noise: alpha-bar at 0 is the chance that a node is what the network says."""
    config = replace(TINY, diffusion_steps=500, n_nodes=(0.0,) * 9 + (1.0,))

    def oracle(X: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
        sure_X, sure_E = torch.zeros_like(X), torch.zeros_like(E)
        sure_X[..., 2] = 50
        sure_E[..., 3] = 50
        return sure_X, sure_E

    graphs = sample_micro_batch(FakeEngine(oracle), config, 1, 0, 256, 10)
    assert (graphs.X == 2).float().mean() > 0.999
    assert (graphs.E[:, *torch.triu_indices(9, 9, 1)] == 3).float().mean() > 0.999


def test_the_node_count_does_not_depend_on_the_number_of_steps_or_the_micro_batch() -> None:
    engine = FakeEngine(no_opinion)
    once = sample_ids(engine, TINY, 4, 0, 64, 2, 64).n
    assert torch.equal(once, sample_ids(engine, TINY, 4, 0, 64, 20, 8).n)


@given(
    weights=st.lists(st.floats(0, 10, width=32), min_size=2, max_size=6).filter(lambda w: sum(w) > 1e-3),
    k=st.integers(0, 2**24 - 1),
)
def test_a_draw_is_the_inverse_of_the_cumulated_weights_and_never_a_class_of_weight_zero(
    weights: list[float], k: int
) -> None:
    u = (k + 1) / 2**24
    index = int(draw(torch.tensor(weights), torch.tensor(u)))
    assert weights[index] > 0
    cumulated = np.cumsum(np.array(weights)) / np.sum(weights)
    below = cumulated[index - 1] if index else 0
    assert below - 1e-5 <= u <= cumulated[index] + 1e-5


@pytest.mark.parametrize("weights", [[0.0, 3, 0, 1, 0], [1e-30, 0, 1e-30]])
def test_the_ends_of_the_unit_interval_draw_the_ends_of_the_possible_classes(weights: list[float]) -> None:
    possible = [i for i, w in enumerate(weights) if w]
    ends = draw(torch.tensor([weights, weights]), torch.tensor([2.0**-24, 1.0]))
    assert ends.tolist() == [possible[0], possible[-1]]


def test_a_network_that_gives_nan_is_an_error_and_not_a_molecule() -> None:
    def broken(X: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(X, float("nan")), torch.zeros_like(E)

    with pytest.raises(LogitsNotFinite, match="samples 8 to 15"):
        sample_ids(FakeEngine(broken), TINY, 1, 9, 2, 4, 8)


def test_a_full_device_is_told_with_the_batch_size_that_fits() -> None:
    def room_for(graphs: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def logits(X: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
            if len(X) > graphs:
                raise torch.OutOfMemoryError(f"no room for {len(X)}")
            return no_opinion(X, E)

        return logits

    with pytest.raises(DeviceMemoryFull, match=r"for 32 molecules at a time; 8 fit\. Use --micro-batch 8"):
        sample_micro_batch(FakeEngine(room_for(13)), TINY, SEED, 0, 32, 5)
    with pytest.raises(DeviceMemoryFull, match="not even one fits"):
        sample_micro_batch(FakeEngine(room_for(0)), TINY, SEED, 0, 4, 5)


class FakeLoop(FakeEngine):
    """A LoopEngine that is done at once; tells when a chain is begun."""

    def __init__(self) -> None:
        super().__init__(no_opinion)
        self.begun = [threading.Event() for _ in range(3)]

    def begin(
        self, start: Callable[[], Chain], on_step: Callable[[int], object] | None = None
    ) -> Callable[[], tuple[Tensor, Tensor, bool]]:
        chain = start()
        self.begun[int(chain.ids[0]) // 4].set()
        return lambda: (chain.x.to(torch.int8), chain.e.to(torch.int8), True)

    def denoise(
        self, chain: Chain, on_step: Callable[[int], object] | None = None
    ) -> tuple[Tensor, Tensor, bool]:
        return self.begin(lambda: chain, on_step)()


def test_the_next_batch_is_on_its_way_while_the_caller_works_on_one() -> None:
    engine = FakeLoop()
    assert isinstance(engine, LoopEngine)
    for first, graphs in sample_batches(engine, TINY, SEED, 0, 10, 5, 4):
        assert len(graphs) == min(4, 10 - first)
        if first < 8:
            assert engine.begun[first // 4 + 1].wait(30)


@pytest.mark.parametrize("first_id", [-8, 3])
def test_a_micro_batch_that_is_not_aligned_is_refused(tiny: Engine, first_id: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        sample_micro_batch(tiny, TINY, 1, first_id, 8, 4)


@pytest.mark.parametrize(("first_id", "count", "size"), [(-1, 4, 8), (0, 0, 8), (0, 4, 0)])
def test_no_samples_is_refused(tiny: Engine, first_id: int, count: int, size: int) -> None:
    with pytest.raises(ValueError, match="no samples"):
        sample_ids(tiny, TINY, 1, first_id, count, 4, size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_draws_equal_the_cpu_and_the_step_loop_never_waits() -> None:
    ids, slots = torch.arange(512)[:, None], torch.arange(90)[None]
    assert torch.equal(philox(SEED, ids, 7, slots), philox(SEED, ids.cuda(), 7, slots.cuda()).cpu())

    torch.manual_seed(3)
    engine = TorchEngine(GraphTransformer(TINY), TINY, "cuda")
    whole = as_bytes(sample_ids(engine, TINY, SEED, 0, 64, 6, 32))
    assert as_bytes(sample_ids(engine, TINY, SEED, 41, 1, 6, 32)) == whole[41:42]

    last = 6

    def on_step(step: int) -> None:  # the copies to the CPU after the last step do wait
        torch.cuda.set_sync_debug_mode("error" if step < last else "default")

    try:
        sample_micro_batch(engine, TINY, SEED, 0, 32, 6, on_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
