"""Run: pytest tests/e2e/test_bad_input.py

Bad input gets one line that says what to do, the right exit code, and loses nothing.
"""

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, safe_open, save_file

from bitdgdm.pipelines.quantize import quantize

from .conftest import TINY, Command

MODEL = ["--model", "builtin:digress-qm9"]
LOCAL = ["--executor", "local"]


def _one_line(stderr: str, *words: str) -> None:
    assert stderr.count("\n") == 1 and stderr.startswith("bitdgdm: "), stderr
    for word in words:
        assert word in stderr


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    quantize("builtin:digress-qm9", "rtn-w8a8", out=path, executor="local", quiet=True)
    return path


def test_an_unknown_recipe_is_refused_with_the_known_ones(bitdgdm: Command, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    refused = bitdgdm("quantize", "builtin:digress-qm9", "--recipe", "w3a3", "--out", str(out), code=2)
    _one_line(refused.stderr, "w3a3", "bitdgdm-w4a4-r16-s1")
    assert not out.exists()


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_artifact_is_refused_and_no_campaign_begins(
    bitdgdm: Command, tmp_path: Path, artifact: Path, keep: float
) -> None:
    short = tmp_path / "short.safetensors"
    short.write_bytes(artifact.read_bytes()[: int(keep * artifact.stat().st_size)])
    out = tmp_path / "out"
    refused = bitdgdm("generate", "--model", str(short), "--count", "4", "--out", str(out), *LOCAL, code=2)
    _one_line(refused.stderr, str(short))
    assert not (out / "campaign.json").exists()


def test_a_flipped_byte_in_a_weight_is_noticed(bitdgdm: Command, tmp_path: Path, artifact: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    data = bytearray(artifact.read_bytes())
    data[-1000] ^= 1
    damaged.write_bytes(data)
    refused = bitdgdm(
        "generate", "--model", str(damaged), "--count", "4", "--out", str(tmp_path / "o"), *LOCAL, code=2
    )
    _one_line(refused.stderr, "digest")


def test_an_artifact_of_a_newer_format_asks_for_an_upgrade(
    bitdgdm: Command, tmp_path: Path, artifact: Path
) -> None:
    with safe_open(artifact, "pt") as file:
        metadata = file.metadata()
    newer = metadata | {"format_version": "99"}
    path = tmp_path / "newer.safetensors"
    save_file(load_file(artifact), path, newer)
    refused = bitdgdm(
        "generate", "--model", str(path), "--count", "4", "--out", str(tmp_path / "o"), *LOCAL, code=2
    )
    _one_line(refused.stderr, "99", "pip install -U bitdgdm")


def test_an_unknown_key_in_a_spec_file_is_named(bitdgdm: Command, tmp_path: Path) -> None:
    spec = tmp_path / "campaign.yaml"
    spec.write_text(f"model: builtin:digress-qm9\ncount: 4\nout: {tmp_path}/o\ncolour: red\n")
    _one_line(bitdgdm("generate", str(spec), code=2).stderr, "colour", str(spec))


def test_a_count_of_zero_is_refused_as_json_too(bitdgdm: Command, tmp_path: Path) -> None:
    refused = bitdgdm("generate", *MODEL, "--count", "0", "--out", str(tmp_path / "o"), "--json", code=2)
    document = json.loads(refused.stdout)
    assert document["error"]["exit_code"] == 2 and "count" in document["error"]["message"]


def test_a_resume_under_another_spec_is_refused_and_the_campaign_stays(
    bitdgdm: Command, tmp_path: Path
) -> None:
    out = str(tmp_path / "o")
    first = bitdgdm.json("generate", *MODEL, "--count", "16", *TINY, "--out", out, *LOCAL)
    for change in (["--steps", "5"], ["--seed", "9"], ["--count", "32"]):
        _one_line(
            bitdgdm("generate", "--resume", out, *change, code=2).stderr,
            change[0].removeprefix("--"),
            "--resume",
        )
        _one_line(
            bitdgdm("generate", *MODEL, "--count", "16", *TINY, "--out", out, *change, *LOCAL, code=2).stderr,
            out,
        )
    again = bitdgdm.json("generate", "--resume", out)
    assert again["digest"] == first["digest"]


def test_a_resume_of_nothing_says_how_to_start(bitdgdm: Command, tmp_path: Path) -> None:
    _one_line(
        bitdgdm("generate", "--resume", str(tmp_path / "no"), code=2).stderr, "bitdgdm generate --model"
    )
    _one_line(bitdgdm("status", str(tmp_path / "no"), code=2).stderr, "no campaign")


def test_a_model_that_is_not_registered_points_at_the_list(bitdgdm: Command, tmp_path: Path) -> None:
    for uri in (
        "models:/nothing@champion",
        "models:/nothing/3",
        str(tmp_path / "no.safetensors"),
        "builtin:nothing",
    ):
        refused = bitdgdm("generate", "--model", uri, "--count", "4", "--out", str(tmp_path / "o"), code=2)
        _one_line(refused.stderr, uri.removeprefix("models:/").split("@")[0].split("/")[0])


def test_more_steps_than_the_model_has_are_refused(bitdgdm: Command, tmp_path: Path) -> None:
    refused = bitdgdm(
        "generate", *MODEL, "--count", "4", "--steps", "501", "--out", str(tmp_path / "o"), code=2
    )
    _one_line(refused.stderr, "500", "501")


class _Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_malicious_checkpoint_executes_nothing(bitdgdm: Command, tmp_path: Path, container: str) -> None:
    trace, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    payload = pickle.dumps({"state_dict": _Bomb(trace), "hyper_parameters": {}}, protocol=2)
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
            archive.writestr("archive/version", "3\n")
    else:
        path.write_bytes(payload)
    refused = bitdgdm("import", str(path), "--register", "evil", code=2)
    _one_line(refused.stderr, "evil.ckpt")
    assert not trace.exists()
    assert bitdgdm.json("models", "list") == []


def test_a_dead_registry_is_worth_another_try(bitdgdm: Command, tmp_path: Path) -> None:
    bitdgdm.env["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"  # the discard port: nobody listens
    refused = bitdgdm("models", "list", code=75)
    _one_line(refused.stderr, "MLFLOW_TRACKING_URI")


def test_an_unknown_option_is_one_line_too(bitdgdm: Command) -> None:
    _one_line(bitdgdm("generate", "--colour", "red", code=2).stderr, "--colour")


def test_a_reference_set_that_vanished_is_refused_before_work(bitdgdm: Command, tmp_path: Path) -> None:
    gone = str(tmp_path / "known.smi")
    refused = bitdgdm(
        "generate", *MODEL, "--count", "4", "--novelty", gone, "--out", str(tmp_path / "o"), code=2
    )
    _one_line(refused.stderr, gone)
