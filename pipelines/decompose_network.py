"""Decompose the Linears of a network, group by group, on a cluster or in this process.

Guarantees: the parts are a function of (source weights, recipe, code, kind of processor) only, whatever the number of
workers and however often the job was stopped; finished layers outlive a killed job and are taken over by the next.
Knows nothing of: how a group is decomposed (quant/), what becomes of the parts.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from bitdgdm.infra.errors import BitDGDMError, LayerFailed
from bitdgdm.infra.log import get_logger
from bitdgdm.models.calibrate import calibrate
from bitdgdm.models.source import SourceModel
from bitdgdm.pipelines.finished_layers import FinishedLayers, Parts
from bitdgdm.pipelines.layer_groups import LayerGroup, layer_groups
from bitdgdm.pipelines.progress import ProgressBar
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.stats import LayerStats
from bitdgdm.tasks.decompose_layer import decompose_layers

log = get_logger("decompose_network")

Work = tuple[LayerGroup, list[torch.Tensor], list[LayerStats] | None]


def decompose_network(
    source: SourceModel,
    names: Sequence[str],
    recipe: Recipe,
    kept: FinishedLayers,
    *,
    executor: str = "ray",
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Parts]:
    """Return the parts and report of every Linear in `names`, in that order.

    Layers in `kept` are taken from there, new ones are put there. executor: "ray", or "local" for this process.
    Raises: NotFinite, LayerFailed, LogitsNotFinite.
    """
    weights = {name: source.weights[f"{name}.weight"] for name in names}
    groups = layer_groups(weights, recipe)
    stored = kept.read()
    missing = [group for group in groups if not stored.keys() >= set(group.names)]
    found = {name: stored[name] for group in groups if group not in missing for name in group.names}
    if found:
        log.info("%d of %d layers taken over from a run that was stopped", len(found), len(names))
    stats = _statistics(source, recipe, missing, quiet)
    work = [_work(group, weights, stats) for group in missing]
    run = _here(work) if executor == "local" else _on_ray(work, workers)
    title = f"{source.name} {recipe.name}"
    with ProgressBar(title, len(names), "layers", done=len(found), quiet=quiet) as bar:
        for layers in run:
            kept.write(layers)
            found |= layers
            bar.update(len(found))
    return {name: found[name] for name in names}  # the order of the network, not of arrival


def _statistics(
    source: SourceModel, recipe: Recipe, groups: Sequence[LayerGroup], quiet: bool
) -> dict[str, LayerStats]:
    """Of the inputs of the layers that need them, from molecules that the full-precision network draws."""
    names = [name for group in groups if group.recipe.needs_calibration for name in group.names]
    if not names:
        return {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ProgressBar(f"{source.name} inputs", 100, "%", quiet=quiet) as bar:
        return calibrate(
            source,
            names,
            choice=recipe.calibration,
            device=device,
            progress=lambda done: bar.update(100 * done),
        )


def _work(group: LayerGroup, weights: Mapping[str, torch.Tensor], stats: Mapping[str, LayerStats]) -> Work:
    needed = [stats[name] for name in group.names] if group.recipe.needs_calibration else None
    return group, [weights[name] for name in group.names], needed


def _here(work: Sequence[Work]) -> Iterator[dict[str, Parts]]:
    for group, weights, stats in work:
        yield dict(zip(group.names, decompose_layers(weights, group.recipe, stats), strict=True))


def _on_ray(work: Sequence[Work], workers: int | None) -> Iterator[dict[str, Parts]]:
    """Yield groups as they finish: one task each, on a quarter of a GPU when there are GPUs."""
    if not work:
        return
    import ray

    from bitdgdm.pipelines.ray_run import cluster
    from bitdgdm.tasks.decompose_layer import decompose_task

    with cluster() as c:
        claim = {"num_gpus": 0.25, "num_cpus": 0.5} if c.gpus else {"num_cpus": 1}
        most = workers or (4 * c.gpus if c.gpus else c.cpus)
        task = decompose_task.options(**claim)
        queue = iter(work)
        pending: dict[ray.ObjectRef, LayerGroup] = {}
        while True:
            while len(pending) < most and (item := next(queue, None)):
                group, weights, stats = item
                pending[task.remote(weights, group.recipe, stats)] = group
            if not pending:
                return
            ready, _ = ray.wait(list(pending), num_returns=1)
            for ref in ready:
                group = pending.pop(ref)
                try:
                    yield dict(zip(group.names, ray.get(ref), strict=True))
                except ray.exceptions.RayTaskError as e:
                    if isinstance(e.cause, BitDGDMError):
                        raise e.cause from e
                    reason = f"{type(e.cause).__name__}: {e.cause}"
                    raise LayerFailed(_title(group), reason) from e
                except ray.exceptions.RayError as e:
                    reason = f"its worker died, also on retries ({type(e).__name__})"
                    raise LayerFailed(_title(group), reason) from e


def _title(group: LayerGroup) -> str:
    others = len(group.names) - 1
    return group.names[0] + (f" and {others} more" if others else "")
