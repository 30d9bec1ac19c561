"""The campaign spec: what a user asks for, checked before anything starts.

Guarantees: a spec that validates is complete and immutable; an unknown key, a wrong type or an impossible value is
refused with every problem named; the fields that decide the samples (`IDENTITY`) are told apart from the fields
that only decide how fast they are made.
Knows nothing of: models, storage or Ray; names are resolved in campaign.py.
"""

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitdgdm.infra.errors import SpecInvalid

MAX_SEED = 2**64 - 1


class CampaignSpec(BaseModel):
    """One generation campaign.

    The samples are a function of model, seed, first_id, count, steps, micro_batch, device kind, engine and precision;
    unit_size cuts them into shards; score, novelty and alerts decide the columns. Everything else is about speed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        description="builtin:digress-qm9, models:/NAME/VERSION, models:/NAME@ALIAS, or a .safetensors path"
    )
    out: str = Field(description="where the campaign lives: a folder or s3://bucket/prefix")
    count: int = Field(gt=0, le=2**62, description="how many molecules")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="key of all random numbers")
    first_id: int = Field(0, ge=0, le=2**62, description="id of the first sample; ids are absolute")
    steps: int | None = Field(None, ge=2, description="denoising steps; the model's own T when left out")
    unit_size: int | None = Field(
        None, gt=0, le=2**20, description="molecules in a shard; chosen from count when left out"
    )
    micro_batch: int | None = Field(
        None,
        gt=0,
        le=65536,
        description="molecules in one network call; 64 on CPU, 1024 on GPU, 8192 with the kernels",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the network runs")
    engine: Literal["auto", "torch", "kernels"] = Field(
        "auto",
        description="PyTorch, or our CUDA kernels; auto takes the kernels where they can run the model",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="arithmetic of the parts that are not quantized; auto is bf16 where our kernels run all of the model, else fp32",
    )
    novelty: str | None = Field(
        "builtin:qm9", description="reference set of known molecules (builtin:qm9 or a file), or null"
    )
    score: str = Field("qed", description="the numeric column that ranks molecules")
    alerts: bool = Field(True, description="look up PAINS, BRENK and NIH structure alerts")
    workers: int | None = Field(
        None, gt=0, description="actors in the pool; one a core or a GPU when left out"
    )
    gpus_per_worker: float = Field(
        1.0, gt=0, le=1, description="GPU share of one actor when it runs on a GPU"
    )
    max_attempts: int = Field(
        3, gt=0, le=100, description="application failures of a unit before it is set aside"
    )
    executor: Literal["ray", "local"] = Field("ray", description="a Ray Data actor pool, or this process")


# What the bytes of a shard depend on: part of the fingerprint. `out` and the speed knobs are not.
IDENTITY = (
    "count", "seed", "first_id", "steps", "unit_size", "micro_batch", "device", "engine", "precision",
    "novelty", "score", "alerts",
)  # fmt: skip


def spec_problems(error: ValidationError) -> list[str]:
    """Return one line a problem: the key, what is wrong, the value seen."""
    lines = []
    for e in error.errors():
        key = ".".join(str(part) for part in e["loc"]) or "spec"
        if e["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}")
        elif e["type"] == "missing":
            lines.append(f"{key} is missing")
        else:
            lines.append(f"{key}: {e['msg'].lower()}, got {e['input']!r}")
    return lines


def make_spec(values: dict[str, Any], where: str = "the command line") -> CampaignSpec:
    """Return the validated spec. Raises: SpecInvalid naming every problem."""
    try:
        return CampaignSpec(**values)
    except ValidationError as e:
        raise SpecInvalid(where, spec_problems(e)) from e
    except TypeError as e:  # a key that is no identifier
        raise SpecInvalid(where, [str(e)]) from e


def read_spec(path: str | Path) -> dict[str, Any]:
    """Return the raw mapping in a YAML or JSON spec file, not yet validated. Raises: SpecInvalid."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError as e:
        raise SpecInvalid(str(path), ["there is no such file"]) from e
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as e:
        raise SpecInvalid(str(path), [" ".join(str(e).split())]) from e
    if not isinstance(raw, dict) or not all(isinstance(k, str) for k in raw):
        raise SpecInvalid(str(path), [f"expected a mapping of keys to values, got {type(raw).__name__}"])
    return raw
