"""Run: pytest tests/pipelines/test_quantize_resumes.py

`bitdgdm quantize` is killed with SIGKILL in the middle; what it leaves must help the next run and change nothing.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from bitdgdm.models.digress import GraphTransformer, quantizable
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.source import save_source, source_model
from bitdgdm.pipelines.decompose_network import decompose_network
from bitdgdm.pipelines.finished_layers import FinishedLayers
from bitdgdm.pipelines.layer_groups import layer_groups
from bitdgdm.pipelines.quantize import quantize
from bitdgdm.quant.own_recipes import DEFAULT
from bitdgdm.quant.recipe_book import get_recipe
from bitdgdm.tasks import decompose_layer

ROOT = Path(__file__).resolve().parents[2]
RECIPE = DEFAULT.name
SMALL = dataclasses.replace(QM9_NO_H, n_layers=2)
COMMAND = "from bitdgdm.pipelines.cli import main; main()"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "small.safetensors"
    save_source(path, source_model(SMALL, GraphTransformer(SMALL).state_dict(), "small"))
    return path


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("undisturbed") / "out.safetensors"
    quantize(str(source), RECIPE, out=out, executor="local", quiet=True)
    return out.read_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITDGDM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def start(source: Path, out: Path, executor: str, home: Path) -> subprocess.Popen[bytes]:
    """stderr goes to a file: a pipe would be held open by a Ray cluster that outlives its driver."""
    command = ["quantize", str(source), "--recipe", RECIPE, "--out", str(out), "--executor", executor]
    env = os.environ | {"BITDGDM_HOME": str(home), "PYTHONPATH": str(ROOT)}
    with out.with_suffix(".stderr").open("wb") as told:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *command], env=env, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=told, start_new_session=True,
        )  # fmt: skip


def finished(home: Path) -> int:
    return len(list(home.glob("decompositions/*/*.safetensors")))


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_killed_quantize_resumes_from_finished_layers_and_makes_the_same_artifact(
    executor: str, source: Path, undisturbed: bytes, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    groups = len(layer_groups(weights(), get_recipe(RECIPE)))
    first = start(source, out, executor, home)
    deadline = time.monotonic() + 120
    while finished(home) < 2:
        assert first.poll() is None and time.monotonic() < deadline, "it ended before it was killed"
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with suppress(ProcessLookupError):  # its Ray cluster would go by itself, but slowly
        os.killpg(first.pid, signal.SIGKILL)
    assert 2 <= finished(home) < groups and not out.exists()

    second = start(source, out, executor, home)
    code, told = second.wait(timeout=240), out.with_suffix(".stderr").read_text()
    assert code == 0, told
    assert "taken over from a run that was stopped" in told
    assert finished(home) == 0, "what is in an artifact needs no second copy"
    assert out.read_bytes() == undisturbed


def test_finished_groups_are_not_decomposed_again(
    source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = get_recipe("rtn-w8a8")
    torch.manual_seed(0)
    model = source_model(SMALL, GraphTransformer(SMALL).state_dict(), "small")
    names = quantizable(SMALL)
    kept = FinishedLayers(model, recipe)
    whole = decompose_network(model, names, recipe, kept, executor="local", quiet=True)
    victims = sorted(kept.folder.glob("*.safetensors"))[:2]
    for victim in victims:
        victim.unlink()
    calls: list[int] = []
    real = decompose_layer.decompose_group

    def counted(layers, *rest):  # type: ignore[no-untyped-def]
        calls.append(len(layers))
        return real(layers, *rest)

    monkeypatch.setattr(decompose_layer, "decompose_group", counted)
    again = decompose_network(model, names, recipe, kept, executor="local", quiet=True)
    assert len(calls) == len(victims)
    assert list(again) == list(whole) == list(names)
    for name, (parts, report) in whole.items():
        assert again[name][1] == report
        for key, tensor in parts.tensors().items():
            assert torch.equal(again[name][0].tensors()[key], tensor)


def weights() -> dict[str, torch.Tensor]:
    net = GraphTransformer(SMALL).state_dict()
    return {name: net[f"{name}.weight"] for name in quantizable(SMALL)}
