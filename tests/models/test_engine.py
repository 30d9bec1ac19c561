"""Run: .venv/bin/python -m pytest tests/models/test_engine.py -q"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitdgdm.infra.errors import ArtifactCorrupt, BadInput
from bitdgdm.models.digress import GraphTransformer, quantizable
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.engine import TorchEngine, hardware_name, load_engine, one_thread, resolve_device
from bitdgdm.models.features import network_input
from bitdgdm.models.source import load_source
from bitdgdm.quant.artifact import ArtifactHeader, save_artifact
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe
from bitdgdm.quant.stats import stats_of_rows

TINY = replace(
    QM9_NO_H,
    n_layers=2,
    diffusion_steps=20,
    hidden_mlp_dims=Dims(X=16, E=12, y=12),
    hidden_dims=HiddenDims(dx=32, de=16, dy=16, n_head=4, dim_ffX=32, dim_ffE=16, dim_ffy=32),
)
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA does")


def network() -> GraphTransformer:
    torch.manual_seed(5)
    return GraphTransformer(TINY)


def a_batch(size: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.randint(1, 10, (size, 1), generator=g)
    X = torch.eye(4)[torch.randint(4, (size, 9), generator=g)] * mask[..., None]
    upper = torch.randint(5, (size, 9, 9), generator=g).triu(1)
    E = torch.eye(5)[upper + upper.transpose(1, 2)] * (mask[:, :, None] & mask[:, None])[..., None]
    return X, E, torch.randint(1, 21, (size,), generator=g), mask


def test_logits_are_the_network_on_the_features_at_time_t_over_T() -> None:
    net, (X, E, t, mask) = network(), a_batch()
    engine = TorchEngine(net, TINY)
    with torch.no_grad():
        expected = net(*network_input(X, E, t / 20, mask, TINY), mask)
    for ours, theirs in zip(engine.logits(X, E, t, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        assert ours.dtype == torch.float32 and not ours.requires_grad


def test_a_cpu_engine_computes_on_one_thread_and_puts_the_number_back() -> None:
    seen: list[int] = []

    class Spy(torch.nn.Module):
        def forward(self, X: Tensor, E: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(torch.get_num_threads())
            if len(seen) > 1:
                raise RuntimeError("stop")
            return X, E

    engine, before = TorchEngine(Spy(), TINY), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        engine.logits(*a_batch())
        with pytest.raises(RuntimeError, match="stop"):
            engine.logits(*a_batch())
        assert seen == [1, 1] and torch.get_num_threads() == 3
        with one_thread(torch.device("cpu")), one_thread(torch.device("cpu")):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_shipped_model_is_loaded_by_name_by_value_and_by_its_digest() -> None:
    model = load_source("builtin:digress-qm9")
    batch = a_batch()
    by_name = load_engine("builtin:digress-qm9", "cpu", digest=model.digest)
    by_value = load_engine(model, "cpu")
    assert by_name.config == by_value.config == model.config
    assert torch.equal(by_name.logits(*batch)[1], by_value.logits(*batch)[1])
    with pytest.raises(ArtifactCorrupt, match="the campaign names 00ff"):
        load_engine(model, "cpu", digest="00ff")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net, recipe = network(), get_recipe("rtn-w8a8")
    layers, reports, kept = {}, {}, dict(net.state_dict())
    for name in quantizable(TINY):
        weight, bias = kept.pop(f"{name}.weight"), kept.pop(f"{name}.bias")
        parts, reports[name] = decompose(weight, recipe)
        layers[name] = (parts, bias, None)
    header = ArtifactHeader(recipe, reports, TINY.n_pad, TINY.to_dict(), {"name": "tiny"}, "0")
    path = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    save_artifact(path, header, layers, kept)
    return path


def test_a_quantized_artifact_is_an_engine_close_to_its_source(artifact: Path) -> None:
    engine = load_engine(artifact, "cpu")
    assert engine.config == TINY and engine.name == "tiny rtn-w8a8"
    batch = a_batch()
    full = TorchEngine(network(), TINY).logits(*batch)
    for ours, theirs in zip(engine.logits(*batch), full, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert 0 < error < 0.05


def test_an_artifact_of_another_digest_is_refused(artifact: Path) -> None:
    with pytest.raises(ArtifactCorrupt, match="the campaign names"):
        load_engine(artifact, "cpu", digest="0" * 64)


def test_a_device_or_precision_that_is_not_there_is_refused(artifact: Path) -> None:
    with pytest.raises(BadInput, match="no device 'tpu'"):
        load_engine(artifact, "tpu")
    with pytest.raises(BadInput, match="precision 'bf16'"):
        load_engine(artifact, "cpu", "bf16")
    with pytest.raises(BadInput, match="precision 'fp8'"):
        load_engine(artifact, "cpu", "fp8")


@CPU_ONLY
def test_without_cuda_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(BadInput, match="finds no CUDA device"):
        resolve_device("cuda")


def test_hardware_has_a_name() -> None:
    assert len(hardware_name("cpu")) > 2
    assert hardware_name(torch.device("cpu")) == hardware_name("cpu")


def test_the_engine_tells_a_network_with_static_tables_the_time() -> None:
    recipe = Recipe("static", 8, 8, act_scale="static", act_bins=4, calibration="uniform")
    net, name = network(), quantizable(TINY)[0]
    linear = net.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    width, steps = linear.in_features, TINY.diffusion_steps
    time = torch.arange(1, steps + 1).repeat(4)
    rows = torch.randn(len(time), width) * time[:, None]
    parts, _ = decompose(linear.weight, recipe, stats_of_rows(rows, time, steps))
    layer = QuantLinear.from_parts(parts, linear.bias, recipe)
    owner, _, child = name.rpartition(".")
    setattr(net.get_submodule(owner), child, layer)
    engine, (X, E, _, mask) = TorchEngine(net, TINY), a_batch()
    for t, entry in ((1, 0), (20, 3), (6, 1)):
        engine.logits(X, E, torch.full((len(X),), t), mask)
        assert layer.time_bin is not None and int(layer.time_bin) == entry
    with pytest.raises(ValueError, match="one diffusion time"):
        engine.logits(X, E, torch.arange(1, len(X) + 1), mask)
