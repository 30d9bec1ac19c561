"""Train the thresholds and steps of Learned RPCA and write quant/lrpca_schedule.json.

Twelve unfolded steps; the loss is the mean logarithm of the relative error, over two kinds of matrices in
turn: low-rank + sparse + noise with a known answer (error of the low-rank part), and weights of the shipped
QM9 network with rows, columns and signs shuffled (what rank 16 and an alpha of 1 to 5 % leave). zeta_0 stays
as it is: the start isn't differentiated. Layers 7 and 8 are kept for the test that it prints. About two
minutes on one core. Example:

    python benchmarks/train_lrpca.py
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from bitdgdm.models.digress import quantizable
from bitdgdm.models.source import load_source
from bitdgdm.quant.lrpca import TRAINED, Schedule, geometric, learned_rpca, step
from bitdgdm.quant.robust_pca import keep_largest, scaled_gd, truncated_svd

STEPS = 12
RANK = 16
LOWEST_ETA, HIGHEST_ETA = 0.25, 8 / 9  # the range of the theorem


def synthetic(shape: tuple[int, int], batch: int, draw: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """(W, X, alpha): condition number 1 to 100, 0.5 to 5 % outliers of 2 to 20 times the mean, noise of 0 to
    3 %."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, 1, generator=draw)

    u, v = (torch.linalg.qr(torch.randn(batch, n, RANK, generator=draw))[0] for n in shape)
    fall = torch.linspace(0, 1, RANK) * uniform(0, 2)
    x = (u * 10**-fall) @ v.mT
    size = x.abs().mean(dim=(-2, -1), keepdim=True)
    density = uniform(0.005, 0.05)
    hit = torch.rand(batch, *shape, generator=draw) < density
    outlier = size * 10 ** uniform(0.3, 1.3) * (2 * torch.rand(batch, *shape, generator=draw) - 1)
    noise = size * uniform(0, 0.03) * torch.randn(batch, *shape, generator=draw)
    return x + torch.where(hit, outlier, 0.0) + noise, x, float(density.max())


def shuffled(weights: list[Tensor], batch: int, draw: torch.Generator) -> Tensor:
    """A batch of weights of one shape with their rows, columns and signs shuffled: same spectrum, same
    tails."""
    picked = []
    for i in torch.randint(len(weights), (batch,), generator=draw).tolist():
        w = weights[i]
        rows, columns = (torch.randperm(n, generator=draw) for n in w.shape)
        sign = torch.randint(0, 2, (w.shape[0], 1), generator=draw) * 2 - 1
        picked.append(w[rows][:, columns] * sign)
    return torch.stack(picked)


def unfold(w: Tensor, zeta: Tensor, eta: Tensor) -> Tensor:
    """L R^T after all steps."""
    unit = w.abs().mean(dim=(-2, -1), keepdim=True)
    left, right = truncated_svd(w.clamp(-zeta[0].detach() * unit, zeta[0].detach() * unit), RANK)
    for k in range(STEPS):
        left, right = step(w, left, right, zeta[k + 1] * unit, eta[k])
    return left @ right.mT


def train(real: dict[tuple[int, int], list[Tensor]], updates: int, seed: int) -> Schedule:
    draw = torch.Generator().manual_seed(seed)
    first = geometric(STEPS)
    log_zeta = torch.tensor(first.zeta).log().requires_grad_()
    raw_eta = torch.zeros(STEPS, requires_grad=True)
    optimiser = torch.optim.Adam([log_zeta, raw_eta], lr=0.03)
    fade = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    shapes = list(real)
    squared: Callable[[Tensor], Tensor] = lambda a: a.square().sum(dim=(-2, -1))  # noqa: E731
    for update in range(updates):
        zeta, eta = log_zeta.exp(), LOWEST_ETA + (HIGHEST_ETA - LOWEST_ETA) * raw_eta.sigmoid()
        shape = shapes[int(torch.randint(len(shapes), (), generator=draw))]
        batch = max(2, 2**17 // (shape[0] * shape[1]))
        if update % 2:
            w = shuffled(real[shape], batch, draw)
            rest = w - unfold(w, zeta, eta)
            alpha = 0.01 if update % 4 == 1 else 0.05
            error = squared(rest - keep_largest(rest, alpha)) / squared(w)
        else:
            w, x, _ = synthetic(shape, batch, draw)
            error = squared(unfold(w, zeta, eta) - x) / squared(x)
        optimiser.zero_grad()
        loss = 0.5 * error.clamp_min(1e-12).log().mean()
        loss.backward()
        optimiser.step()
        fade.step()
        if update % 100 < 2:
            print(f"{update:5d} {'real' if update % 2 else 'known'} {loss.item():.4f}", flush=True)
    eta = LOWEST_ETA + (HIGHEST_ETA - LOWEST_ETA) * raw_eta.sigmoid()
    return Schedule(
        tuple(round(z, 5) for z in log_zeta.exp().tolist()), tuple(round(e, 4) for e in eta.tolist())
    )


def compare(schedule: Schedule, held_out: dict[tuple[int, int], list[Tensor]]) -> None:
    """Print the median error on matrices that training hasn't seen, beside the other solvers."""
    draw = torch.Generator().manual_seed(10**6)
    solvers = {
        "trained": lambda w, alpha: learned_rpca(w, RANK, alpha, schedule=schedule),
        "geometric": lambda w, alpha: learned_rpca(w, RANK, alpha),
        f"geometric, {STEPS} steps": lambda w, a: learned_rpca(w, RANK, a, schedule=geometric(STEPS)),
        "scaledgd": lambda w, alpha: scaled_gd(w, RANK, alpha),
    }
    for shape, weights in held_out.items():
        known, x, density = synthetic(shape, 12, draw)
        real = torch.stack(weights)
        for name, solve in solvers.items():
            found = solve(known, min(0.9, 2 * density))
            known_error = (found.left @ found.right.mT - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
            found = solve(real, 0.01)
            rest = real - found.left @ found.right.mT - found.sparse
            real_error = rest.flatten(1).norm(dim=1) / real.flatten(1).norm(dim=1)
            print(f"{shape!s:12} {name:20} known {known_error.median():.2e}  real {real_error.median():.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    source = load_source("builtin:digress-qm9")
    seen: dict[tuple[int, int], list[Tensor]] = {}
    held_out: dict[tuple[int, int], list[Tensor]] = {}
    for name in quantizable(source.config):
        w = source.weights[f"{name}.weight"].float()
        into = held_out if name.split(".")[1] in ("7", "8") else seen
        into.setdefault((w.shape[0], w.shape[1]), []).append(w)
    schedule = train(seen, a.updates, a.seed)
    made = {
        "made_by": f"benchmarks/train_lrpca.py --updates {a.updates} --seed {a.seed}",
        "trained_on": "synthetic low-rank + sparse + noise, and shuffled weights of builtin:digress-qm9",
        "rank": RANK,
        "unit": "mean |W|",
        "zeta": schedule.zeta,
        "eta": schedule.eta,
    }
    TRAINED.write_text(json.dumps(made, indent=1) + "\n")
    compare(schedule, held_out)


if __name__ == "__main__":
    main()
