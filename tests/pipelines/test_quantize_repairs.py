"""Run: pytest tests/pipelines/test_quantize_repairs.py"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bitdgdm.infra.errors import RepairFailed
from bitdgdm.models.digress import GraphTransformer
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.distill import repaired
from bitdgdm.models.source import SourceModel, save_source, source_model
from bitdgdm.pipelines import quantize as module
from bitdgdm.pipelines.quantize import quantize
from bitdgdm.quant.artifact import load_artifact
from bitdgdm.quant.parts import merged, stored_bits
from bitdgdm.quant.recipe import Recipe

TINY = replace(
    QM9_NO_H,
    n_layers=1,
    hidden_mlp_dims=Dims(X=8, E=8, y=8),
    hidden_dims=HiddenDims(dx=16, de=8, dy=8, n_head=4, dim_ffX=8, dim_ffE=8, dim_ffy=8),
)
RECIPE = Recipe(
    "repaired-w3a8-r2", weight_bits=3, act_bits=8, factor_bits=8, repair_steps=6, repair_rank=2, calibration="uniform",
)  # fmt: skip


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SourceModel:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE.to_dict()))
    monkeypatch.setattr(module, "repaired", partial(repaired, molecules=4, steps=4))
    torch.manual_seed(0)
    model = source_model(TINY, GraphTransformer(TINY).state_dict(), "tiny")
    save_source(tmp_path / "tiny.safetensors", model)
    return model


def quantize_to(path: Path) -> None:
    """The source that lies beside the path, by the recipe that lies there too."""
    source, recipe = path.with_name("tiny.safetensors"), path.with_name("recipe.json")
    quantize(str(source), str(recipe), out=path, executor="local", quiet=True)


def test_a_recipe_with_repair_stores_its_factors_and_reports_the_repaired_layers(
    source: SourceModel, tmp_path: Path
) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        quantize_to(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    artifact = load_artifact(paths[0])
    assert artifact.layers
    for name, (parts, bias, _) in artifact.layers.items():
        report = artifact.header.layers[name]
        assert parts.proj_up is not None and report.rank == 2
        assert report.stored_bits == stored_bits(parts)
        assert bias is not None and not torch.equal(bias.float(), source.weights[f"{name}.bias"].float())
        w = source.weights[f"{name}.weight"].double()
        assert report.relative_error == pytest.approx(float((merged(parts) - w).norm() / w.norm()), rel=1e-4)


def test_a_repair_that_fails_is_told_by_name_and_leaves_no_file(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("the loss of repair step 0 is nan")

    monkeypatch.setattr(module, "repaired", broken)
    out = tmp_path / "out.safetensors"
    with pytest.raises(RepairFailed, match=RECIPE.name):
        quantize_to(out)
    assert not out.exists()
