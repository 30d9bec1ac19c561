"""Draw graphs by id: from noise in any number of steps, the same graph wherever and with whomever drawn.

Guarantees (law L1): graph i is a function of (engine, seed, i, number of steps, micro-batch size) only. The
network always sees one whole micro-batch of a fixed shape, aligned to absolute ids: graph i sits in slot
i mod size, and ids that nobody asked for are computed as companions and dropped. An engine that runs the whole
loop (LoopEngine) is independent of companions by itself: it gets the ids asked for, and the micro-batch size only
bounds its memory. Inside the step loop there is no host synchronisation.
Knows nothing of: which network or hardware the engine is, chemistry, units, files.

A draw for the state at time s is keyed by step s; the node count and z_T are keyed by step T.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from bitdgdm.infra.errors import DeviceMemoryFull, LogitsNotFinite
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.engine import one_thread
from bitdgdm.models.noise import cosine_schedule, posterior, posterior_table, steps
from bitdgdm.models.philox import count_slot, edge_slots, node_slots, philox
from bitdgdm.models.seam import Chain, Engine, LoopEngine


@dataclass(frozen=True)
class Graphs:
    """Graphs of consecutive ids, on the CPU. n: int64[B]; X: int8[B, n_pad]; E: int8[B, n_pad, n_pad].

    X and E hold class indices, 0 beyond the n nodes of a graph; E is symmetric with 0 on the diagonal.
    """

    n: Tensor
    X: Tensor
    E: Tensor

    def __len__(self) -> int:
        return len(self.n)

    def __getitem__(self, part: slice) -> "Graphs":
        return Graphs(self.n[part], self.X[part], self.E[part])

    @staticmethod
    def concat(parts: list["Graphs"]) -> "Graphs":
        """Join parts of consecutive ids."""
        return Graphs(*(torch.cat([getattr(p, field) for p in parts]) for field in ("n", "X", "E")))


@dataclass(frozen=True)
class _Plan:
    """Everything of a sampler run that doesn't depend on ids, on the device."""

    times: tuple[int, ...]
    times_on_device: Tensor
    node_tables: Tensor  # float32[steps, z_t, x_0, z_s]
    edge_tables: Tensor
    node_noise: Tensor
    edge_noise: Tensor
    node_counts: Tensor
    slots: Tensor  # int64[n_pad + edges]
    rows: Tensor  # int64[edges], of the upper triangle
    cols: Tensor


@lru_cache(maxsize=8)
def _plan(config: DigressConfig, n_steps: int, device: torch.device) -> _Plan:
    schedule = cosine_schedule(config.diffusion_steps)
    times = steps(config.diffusion_steps, n_steps)

    def tables(marginals: tuple[float, ...]) -> Tensor:
        m = np.array(marginals)
        stack = [posterior_table(schedule, m, t, s) for t, s in pairwise(times)]
        return torch.from_numpy(np.stack(stack)).to(device, torch.float32)

    def weights(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    rows, cols = torch.triu_indices(config.n_pad, config.n_pad, 1)
    slots = torch.cat((node_slots(config.n_pad), edge_slots(config.n_pad, rows, cols)))
    return _Plan(
        times, torch.tensor(times, device=device),
        tables(config.node_marginals), tables(config.edge_marginals),
        weights(config.node_marginals), weights(config.edge_marginals), weights(config.n_nodes),
        slots.to(device), rows.to(device), cols.to(device),
    )  # fmt: skip


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Return int64[...]: the class that u falls into, by the inverse of the weights cumulated in class order.

    weights: float[..., K] >= 0, not normalised. u: float32[...] in (0, 1]. Weight 0 is never drawn.
    """
    cumulated = [weights[..., 0]]
    for k in range(1, weights.shape[-1]):  # one after the other, so that the rounding is the same everywhere
        cumulated.append(cumulated[-1] + weights[..., k])
    target = u.to(weights.dtype) * cumulated[-1]
    index = torch.zeros_like(target, dtype=torch.int64)
    for below in cumulated[:-1]:
        index = index + (below < target)
    return index


def sample_micro_batch(
    engine: Engine,
    config: DigressConfig,
    seed: int,
    first_id: int,
    size: int,
    n_steps: int,
    on_step: Callable[[int], object] | None = None,
) -> Graphs:
    """Return the graphs first_id .. first_id + size - 1, one call of the network a step.

    on_step is told the number of steps that were queued (on CUDA they may still run).
    Raises: ValueError if first_id is no multiple of size (any will do for a LoopEngine); LogitsNotFinite;
    DeviceMemoryFull, with the size that fits (a LoopEngine cuts the batch itself).
    """
    if first_id < 0 or (first_id % size and not isinstance(engine, LoopEngine)):
        raise ValueError(f"a micro-batch of {size} starts at a multiple of {size}, not at {first_id}")
    ids = torch.arange(first_id, first_id + size)
    if isinstance(engine, LoopEngine):
        return _begin(engine, config, seed, ids, n_steps, on_step)()
    with torch.inference_mode(), one_thread(engine.device):
        chain = start_chain(config, seed, ids.to(engine.device), n_steps)
        plan, found = _plan(config, n_steps, engine.device), None
        with suppress(torch.OutOfMemoryError):  # its traceback holds what filled the memory
            found = _steps(engine, plan, chain, on_step)
        if found is None:
            raise DeviceMemoryFull(str(engine.device), size, _size_that_fits(engine, plan, chain))
        x, e, finite = found
        if not finite:
            raise LogitsNotFinite(engine.name, first_id, size)
        return Graphs(chain.n.cpu(), x.to(torch.int8).cpu(), e.to(torch.int8).cpu())


def _begin(
    engine: LoopEngine,
    config: DigressConfig,
    seed: int,
    ids: Tensor,
    n_steps: int,
    on_step: Callable[[int], object] | None,
) -> Callable[[], Graphs]:
    """Queue the graphs of ids: int64[B], consecutive; the function returned waits for them."""
    made: list[Tensor] = []

    def start() -> Chain:
        chain = start_chain(config, seed, ids.to(engine.device), n_steps)
        made.append(chain.n.cpu())
        return chain

    with torch.inference_mode(), one_thread(engine.device):
        wait = engine.begin(start, on_step)

    def finished() -> Graphs:
        x, e, finite = wait()
        if not finite:
            raise LogitsNotFinite(engine.name, int(ids[0]), len(ids))
        return Graphs(made[0], x, e)

    return finished


def _masks(n: Tensor, n_pad: int) -> tuple[Tensor, Tensor]:
    """bool[B, n_pad] of real nodes and bool[B, n_pad, n_pad] of real pairs."""
    mask = torch.arange(n_pad, device=n.device) < n[:, None]
    return mask, mask[:, :, None] & mask[:, None, :]


def _square(edges: Tensor, plan: _Plan, pair_mask: Tensor) -> Tensor:
    """int64[B, n_pad, n_pad], symmetric and masked, of the upper triangle's int64[B, edges]."""
    full = torch.zeros_like(pair_mask, dtype=torch.int64)
    full[:, plan.rows, plan.cols] = edges
    full[:, plan.cols, plan.rows] = edges
    return full * pair_mask


def start_chain(config: DigressConfig, seed: int, ids: Tensor, n_steps: int) -> Chain:
    """Draw the node counts and z_T of ids: int64[B], on their device."""
    plan = _plan(config, n_steps, ids.device)
    n_pad, start = config.n_pad, config.diffusion_steps
    count_key = torch.tensor(count_slot(n_pad), device=ids.device)
    n = draw(plan.node_counts, philox(seed, ids, start, count_key))
    mask, pair_mask = _masks(n, n_pad)
    u = philox(seed, ids[:, None], start, plan.slots)
    x = draw(plan.node_noise, u[:, :n_pad]) * mask
    e = _square(draw(plan.edge_noise, u[:, n_pad:]), plan, pair_mask)
    return Chain(seed, ids, n, x, e, plan.times, plan.node_tables, plan.edge_tables)


def _steps(
    engine: Engine, plan: _Plan, chain: Chain, on_step: Callable[[int], object] | None
) -> tuple[Tensor, Tensor, bool]:
    """What `LoopEngine.denoise` promises, for an engine that only knows logits."""
    device, x, e, n_pad = engine.device, chain.x, chain.e, chain.x.shape[1]
    node_classes = torch.eye(plan.node_tables.shape[1], device=device)
    edge_classes = torch.eye(plan.edge_tables.shape[1], device=device)
    mask, pair_mask = _masks(chain.n, n_pad)
    off_diagonal = ~torch.eye(n_pad, dtype=torch.bool, device=device)
    seen_pairs = pair_mask & off_diagonal  # z_T has no class on the diagonal; every later state has class 0
    finite = torch.ones((), dtype=torch.bool, device=device)

    for k, s in enumerate(plan.times[1:]):
        logits_x, logits_e = engine.logits(
            node_classes[x] * mask[..., None],
            edge_classes[e] * seen_pairs[..., None],
            plan.times_on_device[k].expand(len(x)),
            mask,
        )
        u = philox(chain.seed, chain.ids[:, None], s, plan.slots)
        p_x = posterior(logits_x.softmax(-1), x, plan.node_tables[k])
        upper = e[:, plan.rows, plan.cols]
        p_e = posterior(logits_e[:, plan.rows, plan.cols].softmax(-1), upper, plan.edge_tables[k])
        finite = finite & p_x.isfinite().all() & p_e.isfinite().all()
        x = draw(p_x, u[:, :n_pad]) * mask
        e = _square(draw(p_e, u[:, n_pad:]), plan, pair_mask)
        seen_pairs = pair_mask
        if on_step is not None:
            on_step(k + 1)
    return x, e, bool(finite)


def _size_that_fits(engine: Engine, plan: _Plan, chain: Chain) -> int:
    """The largest of size / 2, size / 4, ... for which the network runs; 0 if not even for one graph."""
    size, one_step = len(chain.ids) // 2, replace(plan, times=plan.times[:2])
    while size:
        with suppress(torch.OutOfMemoryError):
            _steps(engine, one_step, chain.part(0, size), None)
            return size
        size //= 2
    return 0


def sample_batches(
    engine: Engine,
    config: DigressConfig,
    seed: int,
    first_id: int,
    count: int,
    n_steps: int,
    micro_batch: int,
    on_progress: Callable[[float], object] | None = None,
) -> Iterator[tuple[int, Graphs]]:
    """Yield (id of the first graph, graphs) for the ids first_id .. first_id + count - 1 by micro-batch.

    on_progress is told the fraction of all steps that is done.
    Raises: ValueError for a negative id, count or micro_batch below 1; LogitsNotFinite.
    """
    if first_id < 0 or count < 1 or micro_batch < 1:
        raise ValueError(f"no samples: first_id {first_id}, count {count}, micro_batch {micro_batch}")
    stop = first_id + count
    alone = isinstance(engine, LoopEngine)  # it needs no companions
    starts = range(first_id if alone else first_id - first_id % micro_batch, stop, micro_batch)

    def on_step(done: int) -> Callable[[int], None]:
        def told(step: int) -> None:
            if on_progress is not None:
                on_progress((done * n_steps + step) / (len(starts) * n_steps))

        return told

    if isinstance(engine, LoopEngine):
        yield from _one_ahead(engine, config, seed, starts, stop, n_steps, on_step)
        return
    for done, start in enumerate(starts):
        graphs = sample_micro_batch(engine, config, seed, start, micro_batch, n_steps, on_step(done))
        asked = slice(max(first_id - start, 0), min(stop - start, micro_batch))
        yield start + asked.start, graphs[asked]


def _one_ahead(
    engine: LoopEngine,
    config: DigressConfig,
    seed: int,
    starts: range,
    stop: int,
    n_steps: int,
    on_step: Callable[[int], Callable[[int], None]],
) -> Iterator[tuple[int, Graphs]]:
    """Batches of a LoopEngine; a thread queues the next one while the caller works on what it was given."""

    def begin(done: int) -> Callable[[], Graphs]:
        ids = torch.arange(starts[done], min(stop, starts[done] + starts.step))
        return _begin(engine, config, seed, ids, n_steps, on_step(done))

    with ThreadPoolExecutor(1, thread_name_prefix="begin-batch") as thread:
        queued = thread.submit(begin, 0)
        for done, start in enumerate(starts):
            wait = queued.result()
            if done + 1 < len(starts):
                queued = thread.submit(begin, done + 1)
            yield start, wait()


def sample_ids(
    engine: Engine,
    config: DigressConfig,
    seed: int,
    first_id: int,
    count: int,
    n_steps: int,
    micro_batch: int,
    on_progress: Callable[[float], object] | None = None,
) -> Graphs:
    """Return the graphs first_id .. first_id + count - 1. Takes and raises what `sample_batches` does."""
    batches = sample_batches(engine, config, seed, first_id, count, n_steps, micro_batch, on_progress)
    return Graphs.concat([graphs for _, graphs in batches])
