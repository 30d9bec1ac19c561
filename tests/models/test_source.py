"""Run: .venv/bin/python -m pytest tests/models/test_source.py -q"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitdgdm.infra.errors import (
    ArtifactCorrupt,
    ArtifactTooNew,
    BadInput,
    BitDGDMError,
    ModelMismatch,
    ModelNotFound,
    NotFinite,
)
from bitdgdm.models.digress import GraphTransformer
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.source import (
    FORMAT_VERSION,
    SourceModel,
    content_digest,
    halved,
    is_source_file,
    load_source,
    save_source,
    source_model,
)
from bitdgdm.quant.container import write_container

SHARED = Path(os.environ.get("BITDGDM_SHARED", Path(__file__).parents[3] / "shared"))
TINY = replace(
    QM9_NO_H,
    n_layers=2,
    hidden_mlp_dims=Dims(X=8, E=8, y=8),
    hidden_dims=HiddenDims(dx=16, de=8, dy=8, n_head=4, dim_ffX=8, dim_ffE=8, dim_ffy=8),
)


@pytest.fixture(scope="module")
def model() -> SourceModel:
    torch.manual_seed(0)
    return source_model(TINY, GraphTransformer(TINY).state_dict(), "tiny")


@pytest.fixture(scope="module")
def stored(model: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_source(path, model)
    return path


def test_a_source_model_comes_back_from_its_file_or_its_folder(model: SourceModel, stored: Path) -> None:
    for uri in (stored, str(stored), stored.parent):
        back = load_source(uri)
        assert (back.config, back.name, back.digest) == (model.config, model.name, model.digest)
        assert back.weights.keys() == model.weights.keys()
        assert all(torch.equal(back.weights[name], tensor) for name, tensor in model.weights.items())
    assert is_source_file(stored)


def test_equal_models_give_equal_bytes(model: SourceModel, stored: Path, tmp_path: Path) -> None:
    shuffled = dict(reversed(model.weights.items()))
    save_source(tmp_path / "again", source_model(TINY, shuffled, "tiny"))
    assert (tmp_path / "again").read_bytes() == stored.read_bytes()


def test_the_digest_is_of_config_and_tensors_and_not_of_the_name(model: SourceModel) -> None:
    assert source_model(TINY, model.weights, "another").digest == model.digest
    moved = dict(model.weights)
    name = "mlp_out_E.2.bias"
    moved[name] = moved[name] + torch.tensor([0, 0, 0, 0, 1e-7])
    digests = {
        model.digest,
        content_digest(TINY, moved),
        content_digest(replace(TINY, max_weight=151.0), model.weights),
        content_digest(TINY, {**model.weights, name: model.weights[name].reshape(5, 1)}),
        halved(model).digest,
    }
    assert len(digests) == 5


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(stored: Path, tmp_path: Path, place: float, bit: int) -> None:
    content = bytearray(stored.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (tmp_path / "flipped").write_bytes(content)
    with pytest.raises(BitDGDMError):
        load_source(tmp_path / "flipped")


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused_as_corrupt(stored: Path, tmp_path: Path, kept: float) -> None:
    content = stored.read_bytes()
    (tmp_path / "short").write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ArtifactCorrupt):
        load_source(tmp_path / "short")


def rewritten(path: Path, model: SourceModel, **metadata: str) -> Path:
    whole = {
        "kind": "source", "format_version": str(FORMAT_VERSION), "name": "tiny",
        "config": json.dumps(TINY.to_dict()),
    }  # fmt: skip
    write_container(path, model.weights, {**whole, **metadata})
    return path


def test_a_newer_format_is_refused_with_the_way_out(model: SourceModel, tmp_path: Path) -> None:
    with pytest.raises(ArtifactTooNew, match="Upgrade"):
        load_source(rewritten(tmp_path / "new", model, format_version=str(FORMAT_VERSION + 1)))


@pytest.mark.parametrize("metadata", [{"format_version": "one"}, {"config": "{"}])
def test_metadata_that_make_no_sense_are_refused(
    model: SourceModel, tmp_path: Path, metadata: dict[str, str]
) -> None:
    with pytest.raises(ArtifactCorrupt):
        load_source(rewritten(tmp_path / "odd", model, **metadata))


def test_a_config_of_another_network_is_refused(model: SourceModel, tmp_path: Path) -> None:
    other = json.dumps(replace(TINY, n_layers=3).to_dict())
    with pytest.raises(ModelMismatch, match="missing tf_layers"):
        load_source(rewritten(tmp_path / "other", model, config=other))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model: SourceModel, tmp_path: Path, bad: float) -> None:
    weights = {**model.weights, "mlp_out_X.2.bias": torch.tensor([0, 0, bad, 0])}
    with pytest.raises(NotFinite, match=r"mlp_out_X\.2\.bias"):
        source_model(TINY, weights, "tiny")
    with pytest.raises(NotFinite):
        load_source(rewritten(tmp_path / "nan", replace(model, weights=weights)))


def test_halving_refuses_weights_that_16_bit_cannot_hold(model: SourceModel) -> None:
    weights = {**model.weights, "mlp_out_X.2.bias": torch.tensor([0, 0, 1e5, 0])}
    with pytest.raises(NotFinite):
        halved(source_model(TINY, weights, "tiny"))


def test_weights_without_a_config_are_sent_to_import(model: SourceModel, tmp_path: Path) -> None:
    safetensors.torch.save_file(dict(model.weights), tmp_path / "raw.safetensors", metadata={"by": "someone"})
    assert not is_source_file(tmp_path / "raw.safetensors")
    with pytest.raises(BadInput, match="bitdgdm import"):
        load_source(tmp_path / "raw.safetensors")


def test_a_quantized_artifact_is_not_taken_for_a_source_model(model: SourceModel, tmp_path: Path) -> None:
    write_container(tmp_path / "q", {}, {"format_version": "1", "header": '{"recipe": {}}'})
    assert not is_source_file(tmp_path / "q")
    with pytest.raises(BadInput, match="quantized"):
        load_source(tmp_path / "q")


@pytest.mark.parametrize("uri", ["builtin:digress-zinc", "nowhere/model.safetensors"])
def test_a_model_that_is_not_there_is_named(uri: str) -> None:
    with pytest.raises(ModelNotFound, match=uri):
        load_source(uri)
    assert not is_source_file(uri)


def test_the_shipped_model_is_the_reference_checkpoint_rounded_to_16_bit() -> None:
    reference = SHARED / "checkpoints" / "digress_qm9_reference.safetensors"
    if not reference.is_file():
        pytest.skip(f"needs {reference}; set BITDGDM_SHARED to the folder that holds checkpoints/")
    weights = safetensors.torch.load_file(reference)
    shipped = load_source("builtin:digress-qm9")
    assert shipped.config == QM9_NO_H and shipped.weights.keys() == weights.keys()
    assert all(torch.equal(shipped.weights[name], weights[name].half()) for name in weights)
