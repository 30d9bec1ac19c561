"""Run: .venv/bin/python -m pytest tests/pipelines/test_evaluate.py

`bitdgdm evaluate` on the shipped model with a tiny budget: figures agree with other ways to get them, and what can't
be compared is refused with the way out.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bitdgdm.infra.errors import BadInput, CampaignNotFound, ModelNotFound
from bitdgdm.infra.rows import KEYS, make_row, read_rows, write_rows
from bitdgdm.models.digress import quantizable
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.divergence import divergence, held_out_states
from bitdgdm.models.engine import load_engine
from bitdgdm.models.held_out import held_out_smiles
from bitdgdm.models.layer_errors import kind_of, output_errors, over_time
from bitdgdm.models.source import load_source, save_source, source_model
from bitdgdm.models.trajectory import walk
from bitdgdm.pipelines.commands_evaluate import compare
from bitdgdm.pipelines.commands_evaluate import evaluate as command
from bitdgdm.pipelines.evaluate import Evaluated, evaluate
from bitdgdm.pipelines.evaluate_samples import Asked
from bitdgdm.pipelines.measure import BITS, KL, OWN_KL
from bitdgdm.pipelines.quantize import quantize
from bitdgdm.quant.artifact import apply, load_artifact, read_header

SOURCE = "builtin:digress-qm9"
FEW = Asked(molecules=4, samples=0, device="cpu", layers=False)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "w4.safetensors"
    quantize(SOURCE, "rtn-w4a4", out=path, executor="local", quiet=True)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "molecules.parquet"
    smiles = held_out_smiles()[::300]
    pq.write_table(pa.table({"smiles": smiles, "split": ["test"] * len(smiles)}), path)
    return str(path)


@pytest.fixture(scope="module")
def whole(artifact: Path, data: str) -> Evaluated:
    asked = Asked(molecules=10, samples=8, steps=3, data=data, device="cpu")
    return evaluate(str(artifact), None, asked, quiet=True)


def values(found: Evaluated, case: str | None = None) -> dict[str, Any]:
    return {r["metric"]: r["value"] for r in found.rows if r["case"] == (case or found.recipe)}


def test_the_divergence_is_that_of_the_two_engines_on_the_same_states(
    whole: Evaluated, artifact: Path, data: str
) -> None:
    states = held_out_states(QM9_NO_H, held_out_smiles(data), 10, 0)
    d = divergence(load_engine(SOURCE, "cpu"), load_engine(artifact, "cpu"), states)
    found = values(whole)
    assert found[KL] == pytest.approx(1e4 * d.kl, rel=1e-6)
    assert found["TV of edges, held-out"] == pytest.approx(1e4 * d.tv_e, rel=1e-6)
    assert found[OWN_KL] > 0 and len([r for r in whole.rows if ", held-out, t=" in r["case"]]) == 5 * len(
        states
    )


def test_every_layer_has_its_errors_and_its_place_in_the_report(whole: Evaluated, artifact: Path) -> None:
    header = read_header(artifact)
    for name in quantizable(QM9_NO_H):
        of = values(whole, f"rtn-w4a4, layer {name}")
        assert of["weight error"] == pytest.approx(100 * header.layers[name].relative_error)
        assert of["weight SQNR"] == pytest.approx(-20 * math.log10(of["weight error"] / 100), abs=0.01)
        assert of["output error"] > 0 and of[BITS] == header.layers[name].bits_per_weight
    assert values(whole)[BITS] == pytest.approx(header.bits_per_weight)
    kinds = {r["case"] for r in whole.rows if r["metric"] == "KL, only this kind quantized"}
    assert len(kinds) == 22


def test_the_error_of_an_output_is_that_of_the_layer_on_full_precisions_own_inputs(artifact: Path) -> None:
    source, name = load_source(SOURCE), "tf_layers.2.self_attn.e_out"
    from bitdgdm.models.digress import GraphTransformer

    network = apply(GraphTransformer(source.config), load_artifact(artifact)).eval()
    inputs: dict[int, torch.Tensor] = {}
    walk(source, [name], lambda name, where, t, rows: inputs.update({t: rows.clone()}), molecules=3, steps=2)
    expected = {}
    for t, x in inputs.items():
        exact = (
            x.double() @ source.weights[f"{name}.weight"].double().T + source.weights[f"{name}.bias"].double()
        )
        expected[t] = float((network.get_submodule(name)(x).double() - exact).norm() / exact.norm())
    found = output_errors(source, network, [name], molecules=3, steps=2)
    assert {e.t: e.relative for e in found} == pytest.approx(expected, rel=1e-4)
    assert over_time(found)[name] == pytest.approx(
        np.sqrt(np.mean(np.square(list(expected.values())))), rel=1e-4
    )


def test_the_kinds_of_layers_are_their_names_without_the_place() -> None:
    kinds = {kind_of(name) for name in quantizable(QM9_NO_H)}
    assert len(kinds) == 22 and {"e_out", "x_y", "y_out.2", "linX1"} <= kinds


def test_samples_are_judged_with_intervals(whole: Evaluated) -> None:
    rows = {r["metric"]: r for r in whole.rows if r["case"] == whole.recipe}
    assert rows["validity"]["n"] == 8 and ".." in rows["validity"]["spread"]
    assert rows["molecules/s, ids to rows"]["value"] > 0
    assert "Wasserstein distance of logp" in rows


def test_all_rows_are_rows(whole: Evaluated) -> None:
    assert all(set(r) == KEYS for r in whole.rows)
    json.dumps(whole.rows, allow_nan=False)
    cases = [(r["case"], r["metric"]) for r in whole.rows]
    assert len(cases) == len(set(cases))


def test_a_campaigns_molecules_are_judged_in_place_of_new_ones(
    artifact: Path, data: str, tmp_path: Path
) -> None:
    from bitdgdm.pipelines.generate import run_campaign
    from bitdgdm.pipelines.spec import make_spec
    from bitdgdm.pipelines.submit import open_campaign

    spec = {"model": str(artifact), "count": 12, "steps": 3, "executor": "local", "device": "cpu", "alerts": False,
            "micro_batch": 4, "unit_size": 4, "out": str(tmp_path / "out")}  # fmt: skip
    run_campaign(*open_campaign(make_spec(spec, "test")), quiet=True)
    asked = Asked(molecules=4, campaign=str(tmp_path / "out"), data=data, device="cpu", layers=False)
    rows = {r["metric"]: r for r in evaluate(str(artifact), None, asked, quiet=True).rows}
    shards = pa.concat_tables(
        pq.read_table(p) for p in sorted((tmp_path / "out" / "data").rglob("*.parquet"))
    )
    assert rows["validity"]["n"] == 12
    assert rows["validity"]["value"] == pytest.approx(100 * sum(shards["is_valid"].to_pylist()) / 12)
    other = Asked(campaign=str(tmp_path / "out"), data=data, device="cpu", layers=False)
    with pytest.raises(BadInput, match=r"was drawn from .* Give that model"):
        evaluate(SOURCE, None, other, quiet=True)


def test_a_source_model_is_judged_by_its_samples_alone(data: str) -> None:
    asked = Asked(samples=4, steps=2, data=data, device="cpu")
    found = evaluate(SOURCE, None, asked, quiet=True)
    assert found.recipe == "full-precision" and "validity" in values(found) and KL not in values(found)
    with pytest.raises(BadInput, match="Add --samples"):
        evaluate(SOURCE, None, Asked(device="cpu"), quiet=True)
    with pytest.raises(BadInput, match="drop --against"):
        evaluate(SOURCE, SOURCE, asked, quiet=True)


def test_what_cannot_be_compared_is_refused_with_the_way_out(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="bitdgdm models list"):
        evaluate(str(artifact), str(tmp_path / "none.safetensors"), FEW, quiet=True)
    with pytest.raises(BadInput, match="quantized itself"):
        evaluate(str(artifact), str(artifact), FEW, quiet=True)
    with pytest.raises(BadInput, match="--steps 1 to 500"):
        evaluate(str(artifact), None, Asked(steps=501, device="cpu"), quiet=True)
    with pytest.raises(CampaignNotFound):
        evaluate(str(artifact), None, Asked(campaign=str(tmp_path), device="cpu"), quiet=True)
    with pytest.raises(BadInput, match="Drop --samples"):
        command(str(artifact), samples=4, campaign="out/")


def test_the_source_is_asked_for_when_the_one_in_the_header_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped, moved = load_source(SOURCE), tmp_path / "moved.safetensors"
    save_source(tmp_path / "source.safetensors", shipped)
    made = tmp_path / "artifact.safetensors"
    quantize(str(tmp_path / "source.safetensors"), "rtn-w4a4", out=made, executor="local", quiet=True)
    (tmp_path / "source.safetensors").rename(moved)
    with pytest.raises(BadInput, match="Give its source model: --against SOURCE"):
        evaluate(str(made), None, FEW, quiet=True)
    weights = dict(shipped.weights)
    weights["mlp_in_X.0.bias"] = weights["mlp_in_X.0.bias"] + 0.01
    save_source(moved, source_model(shipped.config, weights, "other"))
    with caplog.at_level("WARNING"):
        found = evaluate(str(made), str(moved), FEW, quiet=True)
    assert "has other weights" in caplog.text and values(found)[KL] > 0


def test_a_comparison_holds_the_figures_of_each_evaluation(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.pipelines.fake_evaluation import fake_rows

    folders = []
    for name, seed in (("rtn-w4a4", 1), ("rtn-w8a8", 2), ("rtn-w8a8", 3)):
        folders.append(tmp_path / f"{name}-{seed}")
        write_rows(folders[-1] / "evaluation.json", fake_rows(name, seed), compact=seed == 2)
    assert compare(folders, tmp_path / "both") == 0
    page = (tmp_path / "both" / "comparison.html").read_text()
    assert "rtn-w4a4" in page and str(folders[2]) in page
    assert len(list((tmp_path / "both" / "pictures").glob("*.png"))) >= 3
    with pytest.raises(BadInput, match="Make one: bitdgdm evaluate"):
        compare([tmp_path / "nothing"], tmp_path / "both")


def test_rows_survive_their_file_and_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    rows = [make_row("q", "c", "m", [3.0, 1.0, 2.0], "s", hardware="x")]
    assert rows[0]["value"] == 2.0 and rows[0]["spread"] == "1..3" and rows[0]["n"] == 3
    for compact in (True, False):
        write_rows(tmp_path / "rows.json", rows, compact=compact)
        assert read_rows(tmp_path / "rows.json") == rows
    (tmp_path / "rows.json").write_text('[{"question": 1}]')
    with pytest.raises(BadInput, match="no list of result rows"):
        read_rows(tmp_path / "rows.json")


def test_a_row_names_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    for argv, typed in (
        (["/usr/bin/bitdgdm", "evaluate", "--model", "a b"], "bitdgdm evaluate --model 'a b'"),
        ([f"{root}/pipelines/cli.py", "compare", "x"], "bitdgdm compare x"),
        ([f"{root}/benchmarks/rows.py", "--n", "1"], "python benchmarks/rows.py --n 1"),
        (["benchmarks/rows.py"], "python benchmarks/rows.py"),
    ):
        monkeypatch.setattr("sys.argv", argv)
        assert make_row("q", "c", "m", 1.0, "", hardware="x")["command"] == typed
