"""Run: .venv/bin/python -m pytest tests/models/test_int4_network.py -q   (needs g++; no GPU)"""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitdgdm.infra.errors import KernelsUnavailable
from bitdgdm.models import int4_network
from bitdgdm.models.digress import GraphTransformer, quantizable
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.engine import FUSED_LINEARS, Choice, TorchEngine, choose_engine
from bitdgdm.models.int4_network import FusedEdges, Int4Layer, fuse, kernel_inputs, recipe_refusal
from bitdgdm.quant.artifact import Artifact, ArtifactHeader, apply, save_artifact
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.recipe_book import get_recipe
from bitdgdm.quant.stats import stats_of_rows
from tests.kernels.emulate import Emulator

EMULATED = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
ONE_LAYER = replace(QM9_NO_H, n_layers=1)


def one_layer(name_of_recipe: str) -> Artifact:
    """One layer by a recipe, with thresholds; where it asks for inputs, of low rank and a little noise."""
    torch.manual_seed(1)
    network, recipe = GraphTransformer(ONE_LAYER).requires_grad_(False), get_recipe(name_of_recipe)
    layers, reports = {}, {}
    for name in quantizable(ONE_LAYER):
        linear = network.get_submodule(name)
        stats = None
        if recipe.for_layer(name).calibration != "none":
            rows = torch.randn(64, 4) @ torch.randn(4, linear.in_features) + 0.1 * torch.randn(64, linear.in_features)
            stats = stats_of_rows(rows, torch.full((64,), 250), ONE_LAYER.diffusion_steps)
        parts, reports[name] = decompose(linear.weight, recipe.for_layer(name), stats, contributions=False)
        layers[name] = (parts, linear.bias.detach(), torch.full((linear.in_features,), 0.2))
    kept = {k: v for k, v in network.state_dict().items() if k.rpartition(".")[0] not in layers}
    config = ONE_LAYER.to_dict()
    source = {"uri": "", "name": "one", "version": "1", "digest": ""}
    header = ArtifactHeader(recipe, reports, ONE_LAYER.n_pad, config, source, "test")
    return Artifact(header, layers, kept, "digest")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return one_layer("bitdgdm-w4a4-r16-s1")


@EMULATED
@pytest.mark.parametrize("recipe", ["bitdgdm-w4a4-r16-s1", "bitdgdm-input-w4a4-r8", "gptq-asym-w8a8", "gptq-asym-w4a8", "rtn-w6a6"])
def test_a_fused_network_says_what_quant_linear_says(recipe: str) -> None:
    artifact = one_layer(recipe)
    plain = apply(GraphTransformer(ONE_LAYER), artifact).eval()
    native = {"NATIVE": 1}
    kinds = {**dict.fromkeys(("int4", "int4_narrow", "int4_edge"), native), "int8_narrow": {"NATIVE": 0}, "int8_edge": {"NATIVE": 0}}
    launcher = Emulator({**kinds, "features": {"ROWS": 9}}, arch="89", shared_bytes=101376)
    fused = fuse(copy.deepcopy(plain), artifact, launcher)
    assert sum(isinstance(m, Int4Layer) for m in fused.modules()) == len(artifact.layers) > 10
    assert isinstance(fused.tf_layers[0], FusedEdges) == (recipe != "bitdgdm-input-w4a4-r8")  # no launch has both ends of "input"

    mask = torch.arange(9) < torch.tensor([[3], [9]])
    X = torch.eye(4)[torch.randint(4, (2, 9))] * mask[..., None]
    upper = torch.randint(5, (2, 9, 9)).triu(1)
    E = torch.eye(5)[upper + upper.transpose(1, 2)] * (mask[:, :, None] & mask[:, None])[..., None]
    t = torch.full((2,), 250)
    engines = (TorchEngine(fused, ONE_LAYER, inputs=kernel_inputs(ONE_LAYER, launcher)), TorchEngine(plain, ONE_LAYER))
    for ours, theirs in zip(*(engine.logits(X, E, t, mask) for engine in engines), strict=True):
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()


def test_a_4_bit_artifact_runs_on_its_kernels_unless_fp32_is_asked_for_or_the_gpu_is_too_old(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.safetensors"
    save_artifact(path, artifact.header, artifact.layers, artifact.kept)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(int4_network, "missing", lambda: "")
    fused = Choice("cuda", "fp32", "kernels", FUSED_LINEARS)
    assert choose_engine(path) == fused == choose_engine(path, engine="kernels", precision="fp32")
    assert choose_engine(path, precision="fp32").engine == "torch" == choose_engine(path, engine="torch").engine
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    chosen = choose_engine(path)
    assert chosen.engine == "torch" and "bitdgdm-w4a4-r16-s1" in chosen.reason
    with pytest.raises(KernelsUnavailable, match="bitdgdm-w4a4-r16-s1"):
        choose_engine(path, engine="kernels")


def test_inputs_of_8_bit_run_on_the_kernels_by_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, path = one_layer("gptq-asym-w4a8"), tmp_path / "one.safetensors"
    save_artifact(path, artifact.header, artifact.layers, artifact.kept)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(int4_network, "missing", lambda: "")
    assert choose_engine(path).engine == "torch"
    assert choose_engine(path, engine="kernels") == Choice("cuda", "fp32", "kernels", FUSED_LINEARS)


def test_a_recipe_that_the_kernel_does_not_compute_is_refused_by_name() -> None:
    recipe = get_recipe("bitdgdm-w4a4-r16-s1")
    assert recipe_refusal(recipe) == "" == recipe_refusal(get_recipe("rtn-w4a4"))
    assert "not 8 and 4 of recipe" in recipe_refusal(replace(recipe, weight_bits=8))
    assert recipe_refusal(get_recipe("gptq-asym-w3a8")) == "" == recipe_refusal(get_recipe("rtn-w8a8"))
    assert "rank 32 at most, not 48" in recipe_refusal(replace(recipe, rank=48))
    assert "columns 0" in recipe_refusal(replace(recipe, columns=4, column_choice="weight"))
