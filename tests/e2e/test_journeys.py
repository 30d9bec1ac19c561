"""Run: pytest tests/e2e/test_journeys.py   (one local Ray cluster, about a minute)

The three journeys, as a user walks them: every command's answer feeds the next one.
"""

import hashlib
import json
from pathlib import Path

import duckdb
import torch

from bitdgdm.models.source import load_source
from bitdgdm.quant.artifact import load_artifact

from .conftest import TINY, Command

LOCAL = ["--executor", "local"]


def test_a_checkpoint_is_imported_quantized_promoted_looked_up_and_sampled(bitdgdm: Command, tmp_path: Path) -> None:
    source = load_source("builtin:digress-qm9")
    checkpoint = tmp_path / "last.ckpt"
    torch.save(
        {
            "state_dict": {f"model.{name}": tensor for name, tensor in source.weights.items()},
            "pytorch-lightning_version": "2.0.4",
            "epoch": 3,
        },
        checkpoint,
    )
    config = tmp_path / "config.yaml"
    config.write_text(
        "dataset:\n  name: qm9\n  remove_h: true\nmodel:\n  diffusion_steps: 500\n  n_layers: 9\n"
        "  extra_features: all\n  hidden_dims: {dx: 256, de: 64, dy: 64, n_head: 8, dim_ffX: 256, dim_ffE: 128, dim_ffy: 128}\n"
        "  hidden_mlp_dims: {X: 256, E: 128, y: 128}\n"
    )
    imported = bitdgdm.json("import", str(checkpoint), "--config", str(config), "--register", "qm9-source")
    assert imported["version"]["version"] == 1

    quantize = ["quantize", "models:/qm9-source", "--recipe", "rtn-w8a8", "--register", "qm9", "--alias", "champion"]
    first = bitdgdm.json(*quantize, *LOCAL)
    second = bitdgdm.json(*quantize, *LOCAL)
    assert first["digest"] == second["digest"], "the same source and recipe make the same artifact"

    shown = bitdgdm.json("models", "show", "qm9@champion")
    assert shown["uri"] == "models:/qm9/2" and shown["aliases"] == ["champion"]
    assert shown["facts"]["source digest"] == imported["digest"]
    assert len(shown["layers"]) == first["layers"]
    listed = bitdgdm.json("models", "list")
    assert {(v["name"], v["version"]) for v in listed} == {("qm9-source", 1), ("qm9", 1), ("qm9", 2)}

    pulled = bitdgdm.json("models", "pull", "qm9/1", "--to", str(tmp_path / "pulled"))
    assert load_artifact(pulled["path"]).digest == first["digest"]

    out = tmp_path / "out"
    made = bitdgdm.json("generate", "--model", "models:/qm9@champion", "--count", "20", *TINY, "--out", str(out), *LOCAL)
    campaign = json.loads((out / "campaign.json").read_text())
    assert campaign["model"]["uri"] == "models:/qm9/2", "the alias was resolved once, to a version"
    status = bitdgdm.json("status", str(out))
    assert (status["state"], status["molecules"], status["digest"]) == ("complete", 20, made["digest"])
    report = bitdgdm.json("report", str(out), "--to", str(tmp_path / "page.html"))
    assert campaign["campaign"] in Path(report["report"]).read_text()


def test_the_demo_says_where_everything_is_and_leaves_it_there(bitdgdm: Command, tmp_path: Path) -> None:
    demo = bitdgdm.json("demo", "--out", str(tmp_path / "demo"), "--count", "16", "--steps", "2")
    assert demo["status"]["state"] == "complete"
    assert Path(demo["report"]).is_file()
    rows = duckdb.sql(f"select count(*), count(distinct sample_id) from '{demo['data']}/**/*.parquet'").fetchall()
    assert rows == [(16, 16)]
    assert bitdgdm.json("models", "show", "digress-qm9@champion")["tags"]["recipe"] == demo["quantized"]["recipe"]


def test_the_manifest_names_bytes_that_another_program_can_check(bitdgdm: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = bitdgdm.json("generate", "--model", "builtin:digress-qm9", "--count", "40", *TINY, "--out", str(out), *LOCAL)
    manifest = json.loads((out / "manifest.json").read_text())
    digest = hashlib.sha256()
    for shard in manifest["shards"]:
        sha = hashlib.sha256((out / shard["path"]).read_bytes()).hexdigest()
        assert sha == shard["sha256"]
        digest.update(f"{shard['unit']}:{sha}\n".encode())
    assert digest.hexdigest() == manifest["digest"] == made["digest"]


def test_a_json_answer_is_one_document_and_people_get_text(bitdgdm: Command, tmp_path: Path) -> None:
    for command in (["recipes"], ["models", "list"], ["doctor"]):
        json.loads(bitdgdm(*command, "--json").stdout)
        text = bitdgdm(*command).stdout
        assert text.strip() and not text.lstrip().startswith(("{", "["))
