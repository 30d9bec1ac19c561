"""Negative log-likelihood bound of known molecules under a network, in nats a molecule.

Guarantees: an unbiased estimate, in float64, of the variational bound of the model that the sampler draws from at
n_steps = T; every call of the network has one time t; the standard error counts the choice of times and noise as
well as the choice of molecules.
Knows nothing of: chemistry; a molecule is a graph of class indices with its nodes in the given order.

    -log p(x) <= -log p(n) + KL(q(z_T | x) || m) + sum over t = 1..T of E KL(q(z_t-1 | z_t, x) || p(z_t-1 | z_t))
                 - E log p(x | z_0)

`published` is the number of the published code instead, to be compared with published figures: there p(z_s | z_t) is
the posterior of the mean prediction (the sampler's is the mean of posteriors), every edge counts twice, and the
prior's divergence is taken the other way round.
Source: Vignac et al., DiGress, ICLR 2023, appendix C; github.com/cvignac/DiGress, compute_val_loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.divergence import noised, one_hot_states
from bitdgdm.models.noise import Schedule, cosine_schedule, posterior_table, transition
from bitdgdm.models.sampler import Graphs
from bitdgdm.models.seam import Engine

_FLOOR = 1e-12  # a class of probability 0 that occurs costs 28 nats and not infinity


@dataclass(frozen=True)
class Likelihood:
    """Terms of the bound, float64[M] each, in nats; `group`: int64[M], molecules that shared times.

    size: -log p(n). prior, diffusion, reconstruction: >= 0. published: the published code's total.
    """

    size: Tensor
    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    published: Tensor
    group: Tensor

    @property
    def total(self) -> Tensor:
        """The bound of each molecule, float64[M]."""
        return self.size + self.prior + self.diffusion + self.reconstruction

    @property
    def nll(self) -> tuple[float, float]:
        """Mean bound and its standard error."""
        return self._mean(self.total)

    @property
    def nll_published(self) -> tuple[float, float]:
        """Mean by the published code's formula and its standard error."""
        return self._mean(self.published)

    def _mean(self, values: Tensor) -> tuple[float, float]:
        """Of a mean of groups: molecules that shared times are not independent."""
        mean = float(values.mean())
        groups = int(self.group.max()) + 1
        if groups < 2:
            return mean, float("nan")
        residuals = torch.zeros(groups, dtype=torch.float64).index_add_(0, self.group, values - mean)
        return mean, float((residuals.square().sum() * groups / (groups - 1)).sqrt() / len(values))


def nll_bound(
    engine: Engine,
    config: DigressConfig,
    molecules: Graphs,
    *,
    times: int = 10,
    group: int = 32,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> Likelihood:
    """Estimate the bound of every molecule.

    times: each molecule is looked at in `times` times t, one drawn from each of as many equal parts of 1..T, and at
    t = 0; T is the whole sum over t. group: molecules that run together and share their times.
    progress is told the fraction that is done.
    Raises: ValueError unless 1 <= times <= T and there is a molecule.
    """
    total = config.diffusion_steps
    if not 1 <= times <= total or not len(molecules):
        raise ValueError(f"{len(molecules)} molecules at {times} of {total} times")
    schedule = cosine_schedule(total)
    edges = [total * k // times for k in range(times + 1)]
    rng = np.random.default_rng(seed)
    parts = []
    starts = range(0, len(molecules), group)
    for done, first in enumerate(starts):
        x0 = molecules[first : first + group]
        ids = torch.arange(first, first + len(x0))
        diffusion, published = torch.zeros(2, len(x0), dtype=torch.float64)
        for low, high in pairwise(edges):
            t = int(rng.integers(low, high)) + 1
            kl, kl_published = _step(engine, config, schedule, x0, t, seed, ids)
            diffusion += (high - low) * kl
            published += (high - low) * kl_published
        size = -torch.tensor(config.n_nodes, dtype=torch.float64).clamp(min=_FLOOR).log()[x0.n]
        prior, prior_published = _prior(config, schedule, x0)
        reconstruction, reconstruction_published = _reconstruction(engine, config, x0, seed, ids)
        published += size + prior_published + reconstruction_published
        parts.append((size, prior, diffusion, reconstruction, published, torch.full((len(x0),), done)))
        if progress is not None:
            progress((done + 1) / len(starts))
    return Likelihood(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _step(
    engine: Engine, config: DigressConfig, schedule: Schedule, x0: Graphs, t: int, seed: int, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """One time's divergence, by the sampler's p and by the published code's. float64[B] each."""
    zt = noised(x0, t, config, seed, ids)
    logits_x, logits_e = one_hot_states(zt, t, config).logits(engine)
    node, node_published = _step_kl(logits_x, x0.X, zt.X, config.node_marginals, schedule, t)
    edge, edge_published = _step_kl(logits_e, x0.E, zt.E, config.edge_marginals, schedule, t)
    return _molecules(node, edge, x0.n), _molecules(node_published, 2 * edge_published, x0.n)


def _step_kl(
    logits: Tensor, x0: Tensor, zt: Tensor, marginals: tuple[float, ...], schedule: Schedule, t: int
) -> tuple[Tensor, Tensor]:
    """KL(q(z_s | z_t, x_0) || p(z_s | z_t)) of every node or edge, s = t - 1, for both forms of p."""
    m = np.array(marginals)
    table = torch.from_numpy(posterior_table(schedule, m, t, t - 1))[zt.long()]  # [..., x_0, z_s]
    p0 = logits.double().softmax(-1)
    true = _normalised(table.gather(-2, x0.long()[..., None, None].expand(*x0.shape, 1, len(m))).squeeze(-2))
    mean_of_posteriors = _normalised((p0[..., None, :] @ table).squeeze(-2))
    q_step, q_bar = (
        torch.from_numpy(transition(float(a[i]), m))
        for a, i in ((schedule.keep, t), (schedule.alpha_bar, t - 1))
    )
    posterior_of_mean = _normalised(q_step.T[zt.long()] * (p0 @ q_bar))
    return _kl(true, mean_of_posteriors), _kl(true, posterior_of_mean)


def _prior(config: DigressConfig, schedule: Schedule, x0: Graphs) -> tuple[Tensor, Tensor]:
    """KL(q(z_T | x) || m) of each molecule; and the published form, the other way round and with edges twice."""
    found = []
    for classes, marginals in ((x0.X, config.node_marginals), (x0.E, config.edge_marginals)):
        m = np.array(marginals)
        q = torch.from_numpy(transition(float(schedule.alpha_bar[-1]), m))[classes.long()]
        limit = torch.from_numpy(m).expand_as(q)
        found.append((_kl(q, limit), _kl(limit, q)))
    (node, node_published), (edge, edge_published) = found
    return _molecules(node, edge, x0.n), _molecules(node_published, 2 * edge_published, x0.n)


def _reconstruction(
    engine: Engine, config: DigressConfig, x0: Graphs, seed: int, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """-log p(x | z_0) of each molecule, and with edges twice."""
    states = one_hot_states(noised(x0, 0, config, seed, ids), 0, config)
    node, edge = (
        -logits.double().log_softmax(-1).gather(-1, classes.long()[..., None]).squeeze(-1)
        for logits, classes in zip(states.logits(engine), (x0.X, x0.E), strict=True)
    )
    return _molecules(node, edge, x0.n), _molecules(node, 2 * edge, x0.n)


def _molecules(node: Tensor, edge: Tensor, n: Tensor) -> Tensor:
    """Sum over real nodes and over pairs i < j of real nodes. node: [B, n_pad], edge: [B, n_pad, n_pad] -> [B]."""
    mask = torch.arange(node.shape[1]) < n[:, None]
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(1)
    return node.masked_fill(~mask, 0).sum(1) + edge.masked_fill(~pairs, 0).sum((1, 2))


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of distributions over the last axis; a class that p doesn't have costs nothing."""
    return (p * (p.clamp(min=_FLOOR) / q.clamp(min=_FLOOR)).log()).sum(-1)
