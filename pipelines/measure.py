"""Figures of one model as flat rows: what `bitdgdm evaluate` and the scoreboard both write.

Guarantees: a metric has one name and one unit wherever it is written; the case says what of the model is meant:
"RECIPE", "RECIPE, layer NAME", "RECIPE, kind KIND", "RECIPE, held-out, t=T" or "RECIPE, own, t=T".
Knows nothing of: how a model is opened, where rows go.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bitdgdm.infra.registry_address import home
from bitdgdm.infra.rows import Row, between, make_row
from bitdgdm.models.distribution import Measure
from bitdgdm.models.divergence import Divergence
from bitdgdm.models.profile import Profile, load_profile, profile, profile_key, save_profile
from bitdgdm.quant.layer_report import LayerReport

KL, OWN_KL = "KL, held-out molecules", "KL, own trajectories"
BITS, SIZE = "bits a weight", "file"
KL_UNIT, KL_SCALE = "1e-4", 1e4
HELD_OUT, OWN = "held-out", "own"
_PARTS = {"KL_X": "KL of nodes", "KL_E": "KL of edges", "TV_X": "TV of nodes", "TV_E": "TV of edges"}


@dataclass(frozen=True)
class Rows:
    """Makes the rows of one case."""

    question: str
    case: str
    hardware: str
    baseline: str = ""

    def __call__(self, metric: str, values: Sequence[float] | float, unit: str, **more: Any) -> Row:
        of = more.pop("of", "")
        return make_row(
            self.question, f"{self.case}, {of}" if of else self.case, metric, values, unit, hardware=self.hardware,
            cuda=str(torch.version.cuda), **{"baseline": self.baseline, **more},
        )  # fmt: skip

    def measures(self, found: Sequence[Measure]) -> list[Row]:
        """One row a measure."""
        return [
            self(
                m.metric,
                m.value,
                m.unit,
                n=m.n,
                spread=between(m.low, m.high, ".2f" if m.unit == "%" else ".4g"),
                baseline="",
            )
            for m in found
        ]


def divergence_rows(row: Rows, d: Divergence, where: str, *, over_time: bool) -> list[Row]:
    """Return KL and total variation of all states, and of each time if `over_time`. where: HELD_OUT or OWN."""
    low, high = d.interval()
    title, n = (KL if where == HELD_OUT else OWN_KL), len(d.t)
    found = [row(title, KL_SCALE * d.kl, KL_UNIT, n=n, spread=between(KL_SCALE * low, KL_SCALE * high))]
    whole = {"KL_X": d.kl_x, "KL_E": d.kl_e, "TV_X": d.tv_x, "TV_E": d.tv_e}
    found += [row(f"{_PARTS[k]}, {where}", KL_SCALE * v, KL_UNIT, n=n) for k, v in whole.items()]
    if over_time:
        for at in d.rows():
            of = f"{where}, t={at['t']:.0f}"
            values = {"KL": at["KL"]} | {_PARTS[k]: at[k] for k in whole}
            found += [row(k, KL_SCALE * v, KL_UNIT, n=int(at["molecules"]), of=of) for k, v in values.items()]
    return found


def report_rows(row: Rows, layers: Mapping[str, LayerReport]) -> list[Row]:
    """Return what the artifact's own report says of each layer's weight."""
    found = []
    for name, r in layers.items():
        of = f"layer {name}"
        found += [
            row("weight error", 100 * r.relative_error, "%", n=1, of=of),
            row(BITS, r.bits_per_weight, "bit", n=1, of=of),
        ]
        if r.sqnr_db is not None:
            found.append(row("weight SQNR", r.sqnr_db, "dB", n=1, of=of))
        without = {
            "weight error, dense part alone": r.error_dense,
            "weight error without low rank": r.error_without_low_rank,
            "weight error without sparse": r.error_without_sparse,
        }
        found += [row(k, 100 * v, "%", n=1, of=of) for k, v in without.items() if v is not None]
    return found


def reference_profile(
    smiles: Sequence[str],
    *,
    device: str = "cpu",
    pool: Executor | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> Profile:
    """Return the profile of the reference molecules, kept in BITDGDM_HOME from one time to the next."""
    path = _kept(profile_key(smiles))
    found = load_profile(path, smiles)
    if found is None:
        found = profile(smiles, device=device, pool=pool, on_progress=on_progress)
        save_profile(path, found)
    return found


@cache
def _kept(key: str) -> Path:
    return home() / "profiles" / f"{key[:16]}.parquet"
