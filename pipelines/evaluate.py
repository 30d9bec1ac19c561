"""`bitdgdm evaluate`: one model against the full-precision network that it was made from.

Guarantees: the figures are a function of (model, source, molecules, seed, steps) on one kind of hardware; every share
and every distance has an interval; nothing is written unless all of it was measured.
Knows nothing of: how pictures and pages are made.
"""

import logging
import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bitdgdm.infra.errors import BadInput, ModelNotFound, RegistryUnavailable
from bitdgdm.infra.rows import Row, between
from bitdgdm.models.digress import GraphTransformer, build
from bitdgdm.models.distribution import Z95
from bitdgdm.models.divergence import States, divergence, held_out_states, own_states, predict
from bitdgdm.models.engine import TorchEngine, hardware_name, resolve_device
from bitdgdm.models.held_out import held_out, held_out_smiles
from bitdgdm.models.likelihood import Likelihood, nll_bound
from bitdgdm.models.source import SourceModel, load_source
from bitdgdm.pipelines.catalog import full_uri
from bitdgdm.pipelines.evaluate_layers import curves, kind_rows, layer_rows, percent
from bitdgdm.pipelines.evaluate_samples import Asked, judge_samples, read_campaign_rows
from bitdgdm.pipelines.measure import (
    BITS,
    HELD_OUT,
    OWN,
    SIZE,
    Rows,
    divergence_rows,
)
from bitdgdm.pipelines.model_files import ModelFile, is_source_file, open_model
from bitdgdm.pipelines.progress import ProgressBar
from bitdgdm.quant.artifact import Artifact, apply, load_artifact

QUESTION = "evaluate"
OWN_MOLECULES, OWN_STEPS = 64, 50
_RUNS = 5
_TOGETHER = 16  # molecules of the likelihood bound that share their times
log = logging.getLogger("bitdgdm.evaluate")


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found. model, source: as they were opened."""

    model: str
    digest: str
    recipe: str
    source: str
    rows: list[Row]
    spectra: dict[str, list[float]]


@dataclass(frozen=True)
class _Subject:
    """The model, opened. artifact: None for a source model, which is only sampled from."""

    file: ModelFile
    artifact: Artifact | None
    source: SourceModel
    source_uri: str
    device: str


def evaluate(model: str, against: str | None, asked: Asked, quiet: bool = False) -> Evaluated:
    """Measure `model`; `against` is its source model, found by the artifact's header when left out.

    Raises: BadInput, ModelNotFound, RegistryUnavailable, ArtifactCorrupt, ArtifactTooNew, CampaignNotFound.
    """
    s = _open(model, against, asked)
    config = s.source.config
    if not 0 < (asked.steps or config.diffusion_steps) <= config.diffusion_steps:
        raise BadInput(
            f"steps is {asked.steps}, the model has {config.diffusion_steps}. Give --steps 1 to {config.diffusion_steps}"
        )
    smiles = held_out_smiles(asked.data)
    made = read_campaign_rows(asked.campaign, s.file) if asked.campaign else None
    row = Rows(QUESTION, s.file.recipe, hardware_name(s.device), f"{s.source.name} in full precision")
    rows = _size(row, s)
    shapes: dict[str, list[float]] = {}
    if s.artifact is not None:
        rows += _against_source(row, s, s.artifact, smiles, asked, quiet)
        if asked.layers:
            rows += layer_rows(row, s.source, s.artifact, asked, s.device, quiet)
            shapes = curves(s.source)
    if made is not None or asked.samples:
        rows += judge_samples(row, s.file, s.device, smiles, asked, made, quiet)
    rows.append(row("peak memory of this command", _peak_mb(), "MB", baseline=""))
    return Evaluated(s.file.uri, s.file.digest, s.file.recipe, s.source_uri, rows, shapes)


def _open(model: str, against: str | None, asked: Asked) -> _Subject:
    device = resolve_device(asked.device)
    file = open_model(full_uri(model))
    if file.kind == "source":
        if against:
            raise BadInput(
                f"{model} is a source model, there is nothing to compare. Give an artifact, or drop --against"
            )
        if not asked.samples and not asked.campaign:
            raise BadInput(
                f"{model} is in full precision: only samples can be judged. Add --samples 2000 or --campaign OUT"
            )
        return _Subject(file, None, load_source(file.path), file.uri, device)
    uri = full_uri(against or file.source.get("uri", ""))
    try:
        found = open_model(uri)
    except (ModelNotFound, RegistryUnavailable) as error:
        if against:
            raise
        raise BadInput(
            f"{model} was made from {uri}, which isn't found here ({error}). Give its source model: --against SOURCE"
        ) from error
    if not is_source_file(found.path):
        raise BadInput(
            f"{uri} is quantized itself. Give a full-precision model: --against builtin:digress-qm9"
        )
    source = load_source(found.path)
    if source.config != file.config:
        raise BadInput(
            f"{uri} is another network than {model} was made from ({file.source.get('uri')}). Give that one: --against SOURCE"
        )
    if source.digest != file.source.get("digest"):
        log.warning("%s has other weights than the model that %s was made from", uri, model)
    return _Subject(file, load_artifact(file.path), source, found.uri, device)


def _size(row: Rows, s: _Subject) -> list[Row]:
    full = 2 * sum(w.numel() for w in s.source.weights.values())
    rows = [row(SIZE, s.file.path.stat().st_size / 1e6, "MB", baseline=f"{full / 1e6:.1f} MB in 16 bit")]
    if s.artifact is not None:
        rows.append(
            row(BITS, s.artifact.header.bits_per_weight, "bit", n=len(s.artifact.layers), baseline="")
        )
    return rows


def _networks(s: _Subject, artifact: Artifact) -> tuple[TorchEngine, TorchEngine, nn.Module]:
    """Engines of full precision and of the artifact, and the latter's network."""
    config, source = s.source.config, s.source
    network = apply(GraphTransformer(config), artifact).eval()
    exact = TorchEngine(build(config, source.weights, source.name), config, s.device, name=source.name)
    return exact, TorchEngine(network, config, s.device, name=s.file.recipe), network


def _against_source(
    row: Rows, s: _Subject, artifact: Artifact, smiles: Sequence[str], asked: Asked, quiet: bool
) -> list[Row]:
    exact, ours, network = _networks(s, artifact)
    states = held_out_states(s.source.config, smiles, asked.molecules, asked.seed)
    rows: list[Row] = []
    with ProgressBar("full precision, held-out", 100, "%", quiet=quiet) as bar:
        wanted = predict(exact, states, lambda f: bar.update(100 * f))
    with ProgressBar(f"{s.file.recipe}, held-out", 100, "%", quiet=quiet) as bar:
        rows += divergence_rows(
            row, divergence(wanted, ours, states, lambda f: bar.update(100 * f)), HELD_OUT, over_time=True
        )
    few = min(OWN_MOLECULES, asked.molecules)
    steps = min(OWN_STEPS, max(2, asked.molecules // 4), s.source.config.diffusion_steps)
    with ProgressBar(f"{s.file.recipe}, own trajectories", 100, "%", quiet=quiet) as bar:
        own = own_states(exact, s.source.config, few, steps, asked.seed)
        bar.update(30)
        rows += divergence_rows(
            row, divergence(exact, ours, own, lambda f: bar.update(30 + 70 * f)), OWN, over_time=True
        )
    rows += _speed(row, exact, ours, own[len(own) // 2])
    rows += _bounds(row, exact, ours, smiles, asked, quiet)
    if asked.layers:
        rows += kind_rows(row, s.source, network, list(artifact.layers), states, wanted, s.device, quiet)
    return rows


def _bounds(
    row: Rows, exact: TorchEngine, ours: TorchEngine, smiles: Sequence[str], asked: Asked, quiet: bool
) -> list[Row]:
    """Bounds of the negative log-likelihood, and their difference on the same molecules, times and noise."""
    graphs = held_out(exact.config, smiles, max(2 * _TOGETHER, asked.molecules // 8), asked.seed)
    found = []
    for engine in (exact, ours):
        with ProgressBar(f"likelihood bound, {engine.name}", 100, "%", quiet=quiet) as bar:
            found.append(
                nll_bound(
                    engine,
                    exact.config,
                    graphs,
                    group=_TOGETHER,
                    seed=asked.seed,
                    progress=percent(bar),
                )
            )
    rows = []
    whole, ours_found = found
    for metric, value, error, baseline in (
        ("NLL bound", *ours_found.nll, ""),
        ("NLL bound, full precision", *whole.nll, ""),
        ("NLL by the published code's formula", *ours_found.nll_published, ""),
        ("NLL bound, above full precision", *_difference(ours_found, whole), row.baseline),
    ):
        low, high = (None, None) if math.isnan(error) else (value - Z95 * error, value + Z95 * error)
        rows.append(row(metric, value, "nat", n=len(graphs), spread=between(low, high), baseline=baseline))
    return rows


def _difference(a: Likelihood, b: Likelihood) -> tuple[float, float]:
    """Mean difference of the bounds and its standard error: molecules that share times count as one draw."""
    d = a.total - b.total
    groups = torch.stack([d[a.group == g].mean() for g in a.group.unique()])
    return float(d.mean()), float(groups.std() / math.sqrt(len(groups))) if len(groups) > 1 else math.nan


def _speed(row: Rows, exact: TorchEngine, ours: TorchEngine, batch: States) -> list[Row]:
    """Seconds of one network call, both in turn."""
    engines = {"network call": ours, "network call, full precision": exact}
    times: dict[str, list[float]] = {name: [] for name in engines}
    peaks: dict[str, float] = {}
    for run in range(_RUNS + 1):
        for name, engine in engines.items():
            if engine.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            batch.logits(engine)
            if run:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - began))
            if engine.device.type == "cuda":  # both networks are there, so this is what a call adds to them
                peaks[name] = (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / 1e6
    rows = [row(name, found, f"ms for {len(batch)} molecules", baseline="") for name, found in times.items()]
    rows += [row(f"device memory of a {name}", peak, "MB", baseline="") for name, peak in peaks.items()]
    ratio = statistics.median(times["network call"]) / statistics.median(
        times["network call, full precision"]
    )
    return [*rows, row("time of a network call, of full precision's", ratio, "x", n=_RUNS)]


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
