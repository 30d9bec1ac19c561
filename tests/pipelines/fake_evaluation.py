"""The rows of an evaluation as `bitdgdm evaluate` would write them, without running a network.

Guarantees: layer names are those of the shipped model; equal arguments give equal rows.
Knows nothing of: diffusion models, how figures are measured.
"""

import numpy as np

from bitdgdm.infra.rows import Row
from bitdgdm.models.digress import quantizable
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.distribution import Measure, share
from bitdgdm.models.layer_errors import kind_of
from bitdgdm.pipelines.evaluate import QUESTION, Evaluated
from bitdgdm.pipelines.measure import BITS, KL, OWN_KL, SIZE, Rows

LAYERS = quantizable(QM9_NO_H)


def fake_rows(recipe: str = "bitdgdm-w4a4-r16-s1", seed: int = 0, samples: int = 2000) -> list[Row]:
    rng = np.random.default_rng(seed)
    row = Rows(QUESTION, recipe, "a CPU", "digress-qm9 in full precision")
    kl = 5 * (1 + rng.random())
    rows = [
        row(SIZE, 6.9, "MB", baseline="16.3 MB in 16 bit"), row(BITS, 4 + 3 * rng.random(), "bit", n=len(LAYERS)),
        row(KL, kl, "1e-4", n=2000, spread=f"{0.9 * kl:.3g}..{1.1 * kl:.3g}"), row(OWN_KL, 0.8 * kl, "1e-4", n=3200),
        row("time of a network call, of full precision's", 2.3, "x", n=5),
    ]  # fmt: skip
    for where, factor in (("held-out", 1.0), ("own", 0.8)):
        for t in range(5, 500, 10):
            bump = factor * kl * (0.2 + np.exp(-((t - 120) ** 2) / 9000)) * (0.9 + 0.2 * rng.random())
            of = f"{where}, t={t}"
            for metric, share_of in (
                ("KL", 1),
                ("KL of nodes", 0.4),
                ("KL of edges", 0.1),
                ("TV of nodes", 9),
                ("TV of edges", 3),
            ):
                rows.append(row(metric, bump * share_of, "1e-4", n=40, of=of))
    kinds = list(dict.fromkeys(map(kind_of, LAYERS)))
    strength = dict(zip(kinds, rng.lognormal(-1, 1.2, len(kinds)), strict=True))
    rows += [
        row("KL, only this kind quantized", v, "1e-4", n=400, of=f"kind {k}") for k, v in strength.items()
    ]
    for name in LAYERS:
        base = 3 * strength[kind_of(name)] ** 0.3 * (0.8 + 0.4 * rng.random())
        rows += [
            row("weight error", 2 * base, "%", n=1, of=f"layer {name}"), row("weight SQNR", 25.0, "dB", n=1, of=f"layer {name}"),
            row(BITS, 6.1, "bit", n=1, of=f"layer {name}"), row("output error", base, "%", n=32, of=f"layer {name}"),
        ]  # fmt: skip
        for t in range(500, 0, -50):
            drift = 1 + 0.5 * (t < 150) * rng.random()
            rows.append(row("output error", base * drift, "%", n=32, of=f"layer {name}, t={t}"))
            rows.append(
                row("input max over sigma", 3 + 8 * base * drift, "", n=32, of=f"layer {name}, t={t}")
            )
    if samples:
        valid = int(samples * 0.99)
        found = [
            share("validity", valid, samples),
            share("uniqueness (distinct of valid)", int(0.96 * valid), valid),
        ]
        found += [
            Measure("FCD", 0.9, 0.8, 1.0, "", valid), Measure("scaffold similarity", 0.94, 0.9, 0.97, "", valid),
            Measure("Wasserstein distance of logp", 0.03, 0.02, 0.05, "", valid),
        ]  # fmt: skip
        rows += row.measures(found)
    return rows


def fake_evaluation(recipe: str = "bitdgdm-w4a4-r16-s1", seed: int = 0, samples: int = 2000) -> Evaluated:
    spectra = {
        name: [
            float((1 + k) ** -0.4 * np.exp(-k / 90))
            for k in range(64 if "linE" in name or "_y" in name else 256)
        ]
        for name in LAYERS
    }
    return Evaluated(
        f"models:/{recipe}/1",
        "ab" * 32,
        recipe,
        "builtin:digress-qm9",
        fake_rows(recipe, seed, samples),
        spectra,
    )
