"""Start a campaign, or continue one that is the same.

Guarantees: a campaign is created once, after its storage, model and known molecules were found sound; it is never
continued under another fingerprint, and the fingerprint covers everything that the bytes of a shard depend on.
Knows nothing of: Ray, progress, sampling.
"""

import logging
import os
from importlib.metadata import version
from typing import Any

from bitdgdm.infra.errors import BadInput, BitDGDMError, SpecChanged, SpecInvalid
from bitdgdm.infra.fingerprint import canonical_json, fingerprint
from bitdgdm.infra.provenance import provenance
from bitdgdm.infra.storage import Store, open_store, probe_create_only
from bitdgdm.infra.version import VERSION, code_version
from bitdgdm.models.engine import Choice, choose_engine, describe
from bitdgdm.models.novelty import ReferenceSet, load_reference
from bitdgdm.models.summary import NUMERIC_COLUMNS
from bitdgdm.pipelines.campaign import (
    CAMPAIGN_FILE,
    SCHEMA_VERSION,
    Campaign,
    model_key,
    read_campaign,
    reference_key,
)
from bitdgdm.pipelines.model_files import ModelFile, open_model
from bitdgdm.pipelines.plan import default_unit_size
from bitdgdm.pipelines.ray_run import cluster
from bitdgdm.pipelines.spec import IDENTITY, CampaignSpec, make_spec

log = logging.getLogger("bitdgdm.submit")
_MICRO_BATCH = {("cpu", "torch"): 64, ("cuda", "torch"): 1024, ("cuda", "kernels"): 8192}
_WRITERS = ("pyarrow", "rdkit", "torch")  # their versions reach the bytes of a shard


def resolve_spec(spec: CampaignSpec, model: ModelFile) -> CampaignSpec:
    """Return `spec` with the defaults that depend on the model and the device filled in.

    The model's network is built once, so a model that can't be is refused here and not by every worker.
    Raises: SpecInvalid (more steps than the model has, an unknown score column); what `choose_engine` raises.
    """
    steps = spec.steps or model.config.diffusion_steps
    problems = []
    if steps > model.config.diffusion_steps:
        problems.append(f"steps: {model.name} has {model.config.diffusion_steps} steps, got {steps}")
    if spec.score not in NUMERIC_COLUMNS:
        problems.append(f"score: {spec.score!r} is none of {', '.join(NUMERIC_COLUMNS)}")
    if problems:
        raise SpecInvalid("the spec", problems)
    chosen = _choose(spec, model)
    if chosen.device == "cuda":
        log.info("%s", describe(chosen, model.name))
    micro_batch = spec.micro_batch or _MICRO_BATCH[chosen.device, chosen.engine]
    unit_size = spec.unit_size or default_unit_size(spec.count, micro_batch)
    return spec.model_copy(
        update={
            "device": chosen.device,
            "engine": chosen.engine,
            "precision": chosen.precision,
            "steps": steps,
            "micro_batch": micro_batch,
            "unit_size": unit_size,
            "model": model.uri,
        }
    )


def _choose(spec: CampaignSpec, model: ModelFile) -> Choice:
    """Return what runs the campaign: asked of a GPU worker when it goes to a cluster that has GPUs, else found here."""
    if spec.executor == "ray" and spec.device != "cpu" and os.environ.get("RAY_ADDRESS"):
        import ray

        from bitdgdm.tasks.choose_engine import choose_engine_task

        with cluster() as joined:
            if joined.gpus:
                task = choose_engine_task.options(num_gpus=spec.gpus_per_worker)
                try:
                    return ray.get(
                        task.remote(model.path.read_bytes(), spec.device, spec.precision, spec.engine, model.digest)
                    )
                except ray.exceptions.RayTaskError as e:
                    if isinstance(e.cause, BitDGDMError):
                        raise e.cause from e
                    raise
    return choose_engine(model.path, spec.device, spec.precision, spec.engine, model.digest)


def identity_of(spec: CampaignSpec, model: ModelFile, reference: ReferenceSet | None) -> dict[str, Any]:
    """Return everything that the bytes of the shards depend on."""
    fields = spec.model_dump(mode="json")
    return {
        **{key: fields[key] for key in IDENTITY},
        "model_digest": model.digest,
        "novelty_digest": reference.digest if reference else None,
        "schema": SCHEMA_VERSION,
        "bitdgdm": VERSION,
        **{name: version(name).split("+")[0] for name in _WRITERS},
    }


def open_campaign(spec: CampaignSpec) -> tuple[Campaign, Store]:
    """Create the campaign at spec.out, or continue the one there if it is the same.

    Raises: SpecChanged, SpecInvalid, ModelNotFound, StorageRefused, StorageUnavailable, CreateOnlyUnsupported.
    """
    store = open_store(spec.out)
    if spec.out.startswith("memory:") and spec.executor == "ray":
        raise BadInput(
            "memory:// lives in one process, the workers can't see it. Use a folder or s3://, or --executor local"
        )
    model = open_model(spec.model)
    # workers may stand in another folder, so the place is kept in full
    resolved = resolve_spec(spec, model).model_copy(update={"out": store.url})
    reference = load_reference(resolved.novelty) if resolved.novelty else None
    identity = identity_of(resolved, model, reference)
    mark = fingerprint(identity)
    probe_create_only(store)  # the first write: bad input before it leaves nothing behind
    if store.exists(CAMPAIGN_FILE):
        return _same(read_campaign(store), mark, identity), store
    campaign = Campaign(
        schema_version=SCHEMA_VERSION, campaign=f"{model.name}-{mark[:8]}", fingerprint=mark, spec=resolved,
        model=model.lineage(), identity=identity, provenance=provenance(), code_version=code_version(),
    )  # fmt: skip
    store.create(model_key(model.digest), model.path.read_bytes())
    if reference:
        store.create(reference_key(reference.digest), reference.to_bytes())
    if not store.create(CAMPAIGN_FILE, canonical_json(campaign.model_dump(mode="json")).encode()):
        return _same(
            read_campaign(store), mark, identity
        ), store  # another process started it in the meantime
    return campaign, store


def resume_campaign(url: str, given: dict[str, Any]) -> tuple[Campaign, Store]:
    """Return the campaign at `url`; `given` may repeat its spec or change speed knobs only.

    Raises: CampaignNotFound, SpecChanged, SpecInvalid.
    """
    store = open_store(url)
    stored = read_campaign(store)
    probe_create_only(store)
    if "model" in given and (digest := open_model(given["model"]).digest) != stored.model["digest"]:
        raise SpecChanged(url, "model", stored.model["digest"], digest)
    given = {key: value for key, value in given.items() if key not in ("model", "out")}
    merged = make_spec({**stored.spec.model_dump(), **given}, "the spec")
    for key in IDENTITY:
        if getattr(merged, key) != getattr(stored.spec, key):
            raise SpecChanged(url, key, getattr(stored.spec, key), getattr(merged, key))
    now = {name: version(name).split("+")[0] for name in _WRITERS} | {"bitdgdm": VERSION}
    for name, value in now.items():
        if stored.identity[name] != value:
            raise SpecChanged(url, f"{name} version", stored.identity[name], value)
    return stored.model_copy(update={"spec": merged}), store


def _same(stored: Campaign, mark: str, identity: dict[str, Any]) -> Campaign:
    """Return `stored` if it is the campaign with fingerprint `mark`. Raises: SpecChanged naming a field."""
    if stored.fingerprint == mark:
        return stored
    for key, value in identity.items():
        if stored.identity.get(key) != value:
            raise SpecChanged(stored.spec.out, key, stored.identity.get(key), value)
    raise SpecChanged(stored.spec.out, "fingerprint", stored.fingerprint, mark)
