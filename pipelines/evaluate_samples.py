"""The molecules of a model, drawn or read from a campaign, judged against held-out ones.

Guarantees: what a campaign holds is taken only if this very model made it.
Knows nothing of: layers, divergences.
"""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from bitdgdm.infra.commit import visible_shards
from bitdgdm.infra.errors import BadInput
from bitdgdm.infra.rows import Row
from bitdgdm.infra.storage import open_store
from bitdgdm.models.engine import load_engine
from bitdgdm.models.held_out import QM9
from bitdgdm.models.novelty import BUILTIN, load_reference
from bitdgdm.models.quality import quality
from bitdgdm.models.sampler import sample_batches
from bitdgdm.models.seam import LoopEngine
from bitdgdm.pipelines.campaign import load_campaign
from bitdgdm.pipelines.measure import Rows, reference_profile
from bitdgdm.pipelines.model_files import ModelFile
from bitdgdm.pipelines.progress import ProgressBar
from bitdgdm.tasks.score_unit import Scoring, processes

_SAMPLED_AT_ONCE = {"cpu": 64, "cuda": 2048, "kernels": 8192}
_WORTH_A_POOL = 512  # molecules; processes take seconds to start
log = logging.getLogger("bitdgdm.evaluate")


@dataclass(frozen=True)
class Asked:
    """What to measure. samples: molecules to draw; 0 draws none. campaign: finished samples instead of drawing."""

    molecules: int = 2000
    samples: int = 0
    steps: int | None = None
    campaign: str | None = None
    data: str = QM9
    seed: int = 0
    device: str = "auto"
    layers: bool = True


def judge_samples(
    row: Rows,
    model: ModelFile,
    device: str,
    smiles: Sequence[str],
    asked: Asked,
    made: pa.Table | None,
    quiet: bool,
) -> list[Row]:
    """Return the figures of `made`, or of molecules drawn now, against the reference `smiles`."""
    rows: list[Row] = []
    if made is None:
        made, seconds = _draw(model, asked, quiet)
        rows.append(
            row("molecules/s, ids to rows", made.num_rows / seconds, "1/s", n=made.num_rows, baseline="")
        )
    with _pool() if max(made.num_rows, len(smiles)) > _WORTH_A_POOL else nullcontext() as pool:
        with ProgressBar("reference molecules", 100, "%", quiet=quiet) as bar:
            reference = reference_profile(
                smiles, device=device, pool=pool, on_progress=lambda f: bar.update(100 * f)
            )
        with ProgressBar("generated molecules", 100, "%", quiet=quiet) as bar:
            found = quality(
                made,
                reference,
                device=device,
                pool=pool,
                seed=asked.seed,
                on_progress=lambda f: bar.update(100 * f),
            )
    if reference.features is None:
        log.warning("no FCD: it needs the package fcd. Install it: pip install fcd, or bitdgdm[eval]")
    return rows + row.measures(found)


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), processes())


def _draw(model: ModelFile, asked: Asked, quiet: bool) -> tuple[pa.Table, float]:
    config, steps = model.config, asked.steps or model.config.diffusion_steps
    engine = load_engine(model.path, asked.device)
    kind = "kernels" if isinstance(engine, LoopEngine) else engine.device.type
    scoring = Scoring(config, load_reference(BUILTIN), "qed", alerts=False)
    began, parts = time.monotonic(), []
    with ProgressBar(f"{model.recipe}, {steps} steps", asked.samples, "molecules", quiet=quiet) as bar:
        for first, graphs in sample_batches(
            engine, config, asked.seed, 0, asked.samples, steps, _SAMPLED_AT_ONCE[kind],
            on_progress=lambda f: bar.update(asked.samples * f),
        ):  # fmt: skip
            parts.append(scoring.table(graphs, first))
    return pa.concat_tables(parts), time.monotonic() - began


def read_campaign_rows(url: str, model: ModelFile) -> pa.Table:
    """Return the rows of a campaign that this model made. Raises: BadInput for another model's or an empty one."""
    campaign, store = load_campaign(url), open_store(url)
    if campaign.model["digest"] != model.digest:
        raise BadInput(
            f"{url} was drawn from {campaign.model['uri']} ({campaign.model['digest'][:16]}), not from {model.uri} "
            f"({model.digest[:16]}). Give that model, or generate one: bitdgdm generate --model {model.uri} --count 10000 --out OUT"
        )
    parts = []
    for key in visible_shards(store):
        with store.open_input(key) as file:
            parts.append(pq.read_table(file))
    if not parts:
        raise BadInput(f"{url} has no finished unit yet. Continue it: bitdgdm generate --resume {url}")
    return pa.concat_tables(parts)
