"""Run: pytest tests/pipelines/test_finished_layers.py"""

import dataclasses
import os
import time
from pathlib import Path

import pytest
import torch

from bitdgdm.models.digress import GraphTransformer
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.source import SourceModel, source_model
from bitdgdm.pipelines import finished_layers
from bitdgdm.pipelines.finished_layers import FinishedLayers, Parts
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.recipe import Recipe

RECIPE = Recipe("odd", 3, 8, rank=2, alpha=0.2, factor_bits=4, outlier_sigma=3.0)
TINY = dataclasses.replace(
    QM9_NO_H,
    n_layers=1,
    hidden_mlp_dims=Dims(X=8, E=8, y=8),
    hidden_dims=HiddenDims(dx=16, de=8, dy=8, n_head=4, dim_ffX=8, dim_ffE=8, dim_ffy=8),
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITDGDM_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def source() -> SourceModel:
    torch.manual_seed(0)
    return source_model(TINY, GraphTransformer(TINY).state_dict(), "tiny")


def layers(seed: int, *names: str) -> dict[str, Parts]:
    draw = torch.Generator().manual_seed(seed)
    return {name: decompose(torch.randn(12, 20, generator=draw), RECIPE) for name in names}


def assert_equal(one: dict[str, Parts], other: dict[str, Parts]) -> None:
    assert one.keys() == other.keys()
    for name, (parts, report) in one.items():
        assert report == other[name][1]
        assert dataclasses.replace(parts, **dict.fromkeys(parts.tensors())) == dataclasses.replace(
            other[name][0], **dict.fromkeys(parts.tensors())
        )
        assert parts.tensors().keys() == other[name][0].tensors().keys()
        for key, tensor in parts.tensors().items():
            back = other[name][0].tensors()[key]
            assert back.dtype == tensor.dtype and torch.equal(
                back.view(torch.uint8), tensor.view(torch.uint8)
            )


def test_what_was_finished_comes_back_as_it_was(source: SourceModel) -> None:
    one, two = layers(0, "a.q", "a.k"), layers(1, "a.q.deeper")
    kept = FinishedLayers(source, RECIPE)
    kept.write(one)
    kept.write(two)
    assert_equal(one | two, FinishedLayers(source, RECIPE).read())
    kept.clear()
    assert FinishedLayers(source, RECIPE).read() == {} and not kept.folder.exists()


def test_other_weights_another_recipe_and_other_code_see_nothing_of_it(
    source: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    FinishedLayers(source, RECIPE).write(layers(0, "a"))
    torch.manual_seed(1)
    other = source_model(TINY, GraphTransformer(TINY).state_dict(), "tiny")
    assert FinishedLayers(other, RECIPE).read() == {}
    assert FinishedLayers(source, dataclasses.replace(RECIPE, alpha=0.3)).read() == {}
    monkeypatch.setattr(finished_layers, "_code_digest", lambda: "edited")
    assert FinishedLayers(source, RECIPE).read() == {}


@pytest.mark.parametrize("damage", ["shorter", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_set_aside_and_the_others_are_taken(source: SourceModel, damage: str) -> None:
    kept = FinishedLayers(source, RECIPE)
    kept.write(layers(0, "a"))
    (victim,) = kept.folder.iterdir()
    whole = victim.read_bytes()
    kept.write(layers(1, "b"))
    victim.write_bytes(
        {
            "shorter": whole[:-1],
            "flipped": whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:],
            "empty": b"",
            "foreign": b"{}" * 50,
        }[damage]
    )
    assert set(kept.read()) == {"b"}
    assert not victim.exists()


def test_a_half_written_file_is_not_looked_at(source: SourceModel) -> None:
    kept = FinishedLayers(source, RECIPE)
    kept.write(layers(0, "a"))
    (whole,) = kept.folder.iterdir()
    (kept.folder / f".{whole.name}.tmp1").write_bytes(whole.read_bytes()[:100])  # as a kill leaves it
    assert set(kept.read()) == {"a"}


def test_a_disk_that_takes_nothing_does_not_stop_the_job(source: SourceModel, home: Path) -> None:
    (home / "decompositions").write_text("not a folder")
    kept = FinishedLayers(source, RECIPE)
    kept.write(layers(0, "a"))
    assert kept.read() == {}
    kept.clear()


def test_what_nobody_came_back_for_is_deleted_after_a_month(source: SourceModel, home: Path) -> None:
    folders = [home / "decompositions" / name for name in ("old", "new")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "x.safetensors").write_bytes(b"x")
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(folders[0], (long_ago, long_ago))
    FinishedLayers(source, RECIPE)
    assert not folders[0].exists() and folders[1].exists()
