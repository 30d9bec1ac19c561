"""Run: pytest tests/tasks/test_decompose_layer.py   (one local Ray cluster)"""

from pathlib import Path

import pytest
import torch

from bitdgdm.infra.errors import NotFinite
from bitdgdm.models.source import load_source, save_source, source_model
from bitdgdm.pipelines.quantize import quantize
from bitdgdm.quant.recipe_book import get_recipe
from bitdgdm.tasks.decompose_layer import decompose_layers, decompose_task


@pytest.mark.parametrize("recipe", ["bitdgdm-w4a4-r16-s1", "rtn-w8a8"])
def test_layers_decomposed_by_a_worker_are_byte_equal_to_those_decomposed_here(
    recipe: str, ray_cluster: object
) -> None:
    import ray

    weights = list(torch.randn(3, 128, 64, generator=torch.Generator().manual_seed(3)))
    here = decompose_layers(weights, get_recipe(recipe))
    there = ray.get(decompose_task.remote(weights, get_recipe(recipe), None))
    for (mine, report), (theirs, their_report) in zip(here, there, strict=True):
        assert report == their_report
        assert theirs.tensors().keys() == mine.tensors().keys()
        for name, tensor in mine.tensors().items():
            other = theirs.tensors()[name]
            assert other.dtype == tensor.dtype
            assert bytes(other.view(torch.uint8).numpy()) == bytes(tensor.view(torch.uint8).numpy()), name


def test_the_artifact_is_byte_equal_with_and_without_a_cluster(tmp_path: Path, ray_cluster: object) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    quantize("builtin:digress-qm9", "rtn-w8a8", out=one, executor="local", quiet=True)
    quantize("builtin:digress-qm9", "rtn-w8a8", out=two, executor="ray", workers=2, quiet=True)
    assert one.read_bytes() == two.read_bytes()


def test_a_bad_weight_stops_the_job_by_its_own_error_and_leaves_no_file(
    tmp_path: Path, ray_cluster: object
) -> None:
    import ray

    with pytest.raises(NotFinite):
        ray.get(decompose_task.remote([torch.full((8, 8), torch.nan)], get_recipe("rtn-w4a4"), None))
    model = load_source("builtin:digress-qm9")
    broken = dict(model.weights) | {"tf_layers.3.linX1.weight": torch.full((256, 256), torch.inf)}
    out = tmp_path / "out.safetensors"
    with pytest.raises(NotFinite):
        save_source(tmp_path / "broken.safetensors", source_model(model.config, broken, "broken"))
        quantize(str(tmp_path / "broken.safetensors"), "rtn-w8a8", out=out, quiet=True)
    assert not out.exists()
