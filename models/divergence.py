"""How far a network's predictions are from full precision's: KL divergence and total variation on noisy graphs.

Guarantees: the same states for the same (molecules, seed) on every machine, so that figures of two recipes can be
compared; every batch of states has one time t; distributions are normalised in float64; the values of each
molecule are kept, so that intervals come from a bootstrap over molecules.
Knows nothing of: recipes, artifacts, how an engine computes.

KL_X is the mean over real nodes, KL_E over ordered pairs of different real nodes, of KL(reference || engine) of the
predicted clean class; KL = KL_X + 5 KL_E, the weights of the training loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.held_out import QM9, held_out, held_out_smiles
from bitdgdm.models.noise import cosine_schedule
from bitdgdm.models.philox import edge_slots, node_slots, philox
from bitdgdm.models.sampler import Graphs, draw, sample_micro_batch
from bitdgdm.models.seam import Engine

EDGE_WEIGHT = 5.0
"""Weight of an edge in the loss that the published networks were trained with."""


@dataclass(frozen=True)
class States:
    """Noisy graphs of one time. t: 1..T. X: float32[B, n_pad, classes], E: float32[B, n_pad, n_pad, classes], one-hot
    and 0 where padded; mask: bool[B, n_pad]. On the CPU."""

    t: int
    X: Tensor
    E: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.X)

    def logits(self, engine: Engine) -> tuple[Tensor, Tensor]:
        """What `engine` predicts, on the CPU: see `Engine.logits`."""
        X, E, mask = (v.to(engine.device) for v in (self.X, self.E, self.mask))
        time = torch.full((len(self),), self.t, device=engine.device)
        x, e = engine.logits(X, E, time, mask)
        return x.cpu(), e.cpu()


def one_hot_states(graphs: Graphs, t: int, config: DigressConfig) -> States:
    """The network's view of graphs of class indices; the diagonal of E is class 0, as in training."""
    mask = torch.arange(config.n_pad) < graphs.n[:, None]
    pairs = mask[:, :, None] & mask[:, None, :]
    X = torch.eye(config.output_dims.X)[graphs.X.long()] * mask[..., None]
    E = torch.eye(config.output_dims.E)[graphs.E.long()] * pairs[..., None]
    return States(t, X, E, mask)


def noised(graphs: Graphs, t: int, config: DigressConfig, seed: int, ids: Tensor) -> Graphs:
    """Draw z_t from q(z_t | x_0): each class is kept with probability alpha-bar, else drawn from the marginals.

    graphs: x_0. ids: int64[B], keys of the draws with (seed, t). 0 <= t <= T.
    """
    keep = float(cosine_schedule(config.diffusion_steps).alpha_bar[t])
    n_pad = config.n_pad
    rows, cols = torch.triu_indices(n_pad, n_pad, 1)
    slots = torch.cat((node_slots(n_pad), edge_slots(n_pad, rows, cols)))
    u = philox(seed, ids[:, None], t, slots)

    def forget(classes: Tensor, marginals: tuple[float, ...], u: Tensor) -> Tensor:
        m = torch.tensor(marginals, dtype=torch.float64)
        return draw(keep * torch.eye(len(m), dtype=torch.float64)[classes.long()] + (1 - keep) * m, u)

    mask = torch.arange(n_pad) < graphs.n[:, None]
    x = forget(graphs.X, config.node_marginals, u[:, :n_pad]) * mask
    e = torch.zeros(len(graphs), n_pad, n_pad, dtype=torch.int64)
    e[:, rows, cols] = forget(graphs.E[:, rows, cols], config.edge_marginals, u[:, n_pad:])
    e = (e + e.mT) * (mask[:, :, None] & mask[:, None, :])
    return Graphs(graphs.n, x.to(torch.int8), e.to(torch.int8))


def held_out_states(
    config: DigressConfig,
    smiles: Sequence[str] | None = None,
    molecules: int = 2000,
    seed: int = 0,
    times: int = 50,
) -> list[States]:
    """Noised held-out molecules, `times` batches with t spread evenly over 1..T.

    smiles: where molecules are drawn from; the test split of the shipped QM9 when left out.
    Raises: BadInput if the network can express none of them.
    """
    graphs = held_out(config, held_out_smiles(QM9) if smiles is None else smiles, molecules, seed)
    times, total = min(times, len(graphs), config.diffusion_steps), config.diffusion_steps
    batches = []
    for k in range(times):
        part, ids = graphs[slice(k, None, times)], torch.arange(k, len(graphs), times)
        t = (2 * k + 1) * total // (2 * times) + 1
        batches.append(one_hot_states(noised(part, t, config, seed, ids), t, config))
    return batches


def own_states(
    engine: Engine, config: DigressConfig, molecules: int, steps: int, seed: int = 0
) -> list[States]:
    """The states that `engine` itself goes through while it draws `molecules` graphs: one batch a step."""
    return own_trajectory(engine, config, molecules, steps, seed)[0]


def own_trajectory(
    engine: Engine, config: DigressConfig, molecules: int, steps: int, seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> tuple[list[States], "Predictions"]:  # fmt: skip
    """The states of `own_states` and what the engine predicted there. progress is told the fraction that is done."""
    recorder = _Recorder(engine)

    def on_step(step: int) -> None:
        if progress is not None:
            progress(step / steps)

    sample_micro_batch(recorder, config, seed, 0, molecules, steps, on_step)
    return recorder.seen, Predictions(tuple(recorder.x), tuple(recorder.e))


class _Recorder:
    """An engine that keeps what the sampler shows it. It offers no loop of its own, so every state passes here."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.config, self.device, self.dtype = (
            engine.name,
            engine.config,
            engine.device,
            engine.dtype,
        )
        self.seen: list[States] = []
        self.x: list[Tensor] = []
        self.e: list[Tensor] = []
        self._engine = engine

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        x, e = self._engine.logits(X, E, t, node_mask)
        self.seen.append(States(int(t[0]), X.cpu(), E.cpu(), node_mask.cpu()))
        self.x.append(x.cpu())
        self.e.append(e.cpu())
        return x, e


@dataclass(frozen=True)
class Predictions:
    """Logits of an engine on a list of states; keep those of the reference to compare many engines with it."""

    X: tuple[Tensor, ...]
    E: tuple[Tensor, ...]


def predict(
    engine: Engine, states: Sequence[States], progress: Callable[[float], object] | None = None
) -> Predictions:
    """Run an engine on every batch. progress is told the fraction that is done."""
    xs, es = [], []
    for k, batch in enumerate(states):
        x, e = batch.logits(engine)
        xs.append(x)
        es.append(e)
        if progress is not None:
            progress((k + 1) / len(states))
    return Predictions(tuple(xs), tuple(es))


@dataclass(frozen=True)
class Divergence:
    """Sums over the nodes and ordered pairs of each molecule, all of length M; means are over all nodes and pairs.

    t, nodes, pairs: int64[M]; node_kl, edge_kl, node_tv, edge_tv: float64[M], in nats and in probability.
    """

    t: Tensor
    nodes: Tensor
    pairs: Tensor
    node_kl: Tensor
    edge_kl: Tensor
    node_tv: Tensor
    edge_tv: Tensor

    @property
    def kl_x(self) -> float:
        return _ratio(self.node_kl, self.nodes)

    @property
    def kl_e(self) -> float:
        return _ratio(self.edge_kl, self.pairs)

    @property
    def tv_x(self) -> float:
        return _ratio(self.node_tv, self.nodes)

    @property
    def tv_e(self) -> float:
        return _ratio(self.edge_tv, self.pairs)

    @property
    def kl(self) -> float:
        return self.kl_x + EDGE_WEIGHT * self.kl_e

    def resampled(self, resamples: int = 1000, seed: int = 0) -> NDArray[np.float64]:
        """KL of `resamples` draws of as many molecules with repetition, the same molecules for every engine."""
        rng = np.random.default_rng(seed)
        count = len(self.t)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)

        def means(values: Tensor, counts: Tensor) -> NDArray[np.float64]:
            return (weights @ values.numpy()) / np.maximum(weights @ counts.double().numpy(), 1)

        return means(self.node_kl, self.nodes) + EDGE_WEIGHT * means(self.edge_kl, self.pairs)

    def interval(self, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Percentile interval of KL by a bootstrap over molecules."""
        return _percentiles(self.resampled(resamples, seed), confidence)

    def interval_above(
        self, other: "Divergence", resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> tuple[float, float]:
        """Interval of this KL minus the other's on the same states: much narrower than two intervals apart."""
        gap = self.resampled(resamples, seed) - other.resampled(resamples, seed)
        return _percentiles(gap, confidence)

    def at(self, t: int) -> "Divergence":
        """Of the molecules of one time."""
        here = self.t == t
        return replace(self, **{name: values[here] for name, values in vars(self).items()})

    def rows(self) -> list[dict[str, float]]:
        """One flat row a time, in rising order of t."""
        parts = [(int(t), self.at(int(t))) for t in self.t.unique()]
        return [
            {
                "t": t,
                "molecules": len(d.t),
                "KL": d.kl,
                "KL_X": d.kl_x,
                "KL_E": d.kl_e,
                "TV_X": d.tv_x,
                "TV_E": d.tv_e,
            }
            for t, d in parts
        ]


def divergence(
    reference: Engine | Predictions,
    engine: Engine,
    states: Sequence[States],
    progress: Callable[[float], object] | None = None,
) -> Divergence:
    """Compare two engines on states. reference: full precision, or what it predicted on the same states.

    progress is told the fraction of `engine`'s batches that are done. NaN in, NaN out.
    Raises: ValueError if there are no states, or predictions are not of these states.
    """
    wanted = reference if isinstance(reference, Predictions) else predict(reference, states)
    if not states or len(wanted.X) != len(states):
        raise ValueError(f"{len(states)} batches of states, predictions of {len(wanted.X)}")
    found = predict(engine, states, progress)
    parts = [
        _compare(s, *four) for s, *four in zip(states, wanted.X, wanted.E, found.X, found.E, strict=True)
    ]
    return Divergence(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _compare(states: States, p_x: Tensor, p_e: Tensor, q_x: Tensor, q_e: Tensor) -> tuple[Tensor, ...]:
    mask = states.mask
    pairs = mask[:, :, None] & mask[:, None, :] & ~torch.eye(mask.shape[1], dtype=torch.bool)
    node_kl, node_tv = _distances(p_x, q_x, mask)
    edge_kl, edge_tv = _distances(p_e, q_e, pairs)
    t = torch.full((len(states),), states.t)
    return t, mask.sum(1), pairs.sum((1, 2)), node_kl, edge_kl, node_tv, edge_tv


def _distances(p: Tensor, q: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and total variation of logits [B, ..., K], float64[B]: sums over what is real [B, ...]."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    tv = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return tuple(v.masked_fill(~real, 0).flatten(1).sum(1) for v in (kl, tv))  # type: ignore[return-value]


def _percentiles(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _ratio(values: Tensor, counts: Tensor) -> float:
    return float(values.sum() / counts.sum().clamp(min=1))
