"""Run: .venv/bin/python -m pytest tests/pipelines/test_scoreboard.py

The scoreboard: what is measured again and what is not, and the tables and pictures that are made of its rows.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from bitdgdm.infra.rows import make_row, read_rows, write_rows
from bitdgdm.pipelines.measure import BITS, KL
from bitdgdm.quant.recipe_book import get_recipe, recipes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import scoreboard_board
import scoreboard_merge
import scoreboard_page
import scoreboard_samples


def row(case: str, metric: str, value: float, unit: str = "", hardware: str = "a GPU", **more: Any) -> dict:
    return make_row("scoreboard", case, metric, value, unit, hardware=hardware, **more)


def board_of(*, samples: bool = True) -> list[dict]:
    rows = []
    for name, bits, kl in (
        ("rtn-w8a8", 8.1, 0.08),
        ("rtn-w4a4", 4.1, 33.0),
        ("bitdgdm-w4a4-r16-s1", 6.1, 7.0),
    ):
        rows += [row(name, BITS, bits, "bit"), row(name, KL, kl, "1e-4", spread=f"{kl / 2}..{kl * 2}")]
        if samples:
            case = f"{name}, 10000 samples, 500 steps"
            rows += [
                row(case, "validity", 99.7 - kl / 50, "%", spread="99.00..99.90"),
                row(case, "FCD", 1.0 + kl / 50),
            ]
            rows += [row(f"{name}, 64 samples, 20 steps", "validity", 50.0, "%")]
            rows.append(row(case, "molecules/s, ids to graphs", 100 + bits, "1/s", baseline="our kernels"))
    return [*rows, row("full-precision, 10000 samples, 500 steps", "validity", 99.8, "%")]


def lines(table: str) -> list[list[str]]:
    return [
        [c.strip() for c in line.strip("|").split(" | ")]
        for line in table.split("\n")
        if line.startswith("| ")
    ]


def test_the_brief_table_has_what_was_sampled_and_no_other_line() -> None:
    known = [row("gptq-w3a8", BITS, 3.1, "bit"), row("gptq-w3a8", KL, 9.0, "1e-4")]
    head, _, *body = lines(scoreboard_page.brief([*known, *board_of()]))
    assert "weight error" not in head and head[-1] == "molecules/s"
    assert [line[0] for line in body] == ["`rtn-w4a4`", "`bitdgdm-w4a4-r16-s1`", "`rtn-w8a8`", "full-precision"]


def test_a_study_takes_size_and_kl_from_a_machine_without_samples() -> None:
    name = "bitdgdm-w4a4-r8-s1"
    others = [row(name, BITS, 5.25, "bit", "a CPU"), row(name, KL, 8.13, "1e-4", "a CPU")]
    others += [row("rtn-w8a8", KL, 77.0, "1e-4", "a CPU")]
    page = scoreboard_page.ranks([*others, *board_of()])
    line = next(line for line in lines(page) if f"`{name}`" in line)
    assert line[6:8] == ["5.25", "8.13"] and line[9] == ""
    assert "77" not in scoreboard_page.brief([*others, *board_of()])


def test_the_table_is_sorted_by_stored_bits_and_joins_samples_with_the_rest() -> None:
    head, _, *body = lines(scoreboard_page.section(board_of()))
    assert [line[0] for line in body] == [
        "`rtn-w4a4`",
        "`bitdgdm-w4a4-r16-s1`",
        "`rtn-w8a8`",
        "full-precision",
    ]
    at = {title: i for i, title in enumerate(head)}
    assert body[0][at["KL, 1e-4"]] == "33 (16.5 to 66.0)" and body[0][at["bits a weight"]] == "4.10"
    assert body[2][at["valid"]].startswith("99.70 %") and body[3][at["valid"]] == "99.80 %"


def test_the_hardware_with_most_samples_comes_first_and_none_is_left_out() -> None:
    other = [row("rtn-w4a4", BITS, 4.1, "bit", hardware="a CPU")]
    page = scoreboard_page.section([*other, *board_of()])
    assert page.index("### a GPU") < page.index("### a CPU")
    assert "No result file yet" in scoreboard_page.section([])


def test_published_figures_stand_beside_ours() -> None:
    ours = next(line for line in lines(scoreboard_page.ranks(board_of())) if "`bitdgdm-w4a4-r16-s1`" in line)
    assert "6.10" in ours and any(cell.startswith("7 ") for cell in ours)
    full = next(
        line for line in lines(scoreboard_page.ablations(board_of())) if "`bitdgdm-w4a4-r16-s1`" in line
    )
    assert "perplexity 4.5, 2.5 x" in full and "6.10" in full
    assert "51.6 %" in scoreboard_page.ranks([])


def test_every_recipe_of_the_studies_is_in_the_book() -> None:
    known = {r.name for r in recipes()}
    named = {name.format(rank) for name in scoreboard_page._RANKS for rank in scoreboard_page.PUBLISHED_RANKS}
    assert named | {recipe for _, _, recipe in scoreboard_page._ABLATIONS} <= known


def test_pictures_are_small_and_speed_is_shown_of_kernels_only(tmp_path: Path) -> None:
    names = scoreboard_page.write_pictures(board_of(), tmp_path)
    assert names == [f"scoreboard-{n}.png" for n in ("size-kl", "size-invalid", "size-fcd", "speed-kl")]
    assert all(0 < (tmp_path / n).stat().st_size < 150_000 for n in names)
    assert all(f"(pictures/{n})" in scoreboard_page.gallery([], tmp_path) for n in names)
    fake = [{**r, "baseline": "PyTorch, fake quantization"} for r in board_of()]
    assert "scoreboard-speed-kl.png" not in scoreboard_page.pictures(fake)
    assert scoreboard_page.pictures([]) == {} and scoreboard_page.gallery([], tmp_path / "none") == ""


def a_board(rows: list[dict], **changes: Any) -> Any:
    made = {"again": False, "samples": 10, "steps": 3, "done": {(r["case"], r["metric"]): r for r in rows}}
    return SimpleNamespace(**made | changes)


def test_a_recipe_is_measured_again_if_it_or_the_code_changed_and_when_asked_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = get_recipe("rtn-w4a4")
    rows = [row(recipe.name, KL, 33.0), row(recipe.name, scoreboard_board.MARK, 1, spread=scoreboard_board.mark_of(recipe))]
    has = scoreboard_board.Board.has
    assert has(a_board(rows), recipe, KL, recipe.name)
    assert not has(a_board(rows, again=True), recipe, KL, recipe.name)
    assert not has(a_board(rows[:1]), recipe, KL, recipe.name)
    assert not has(a_board([]), recipe, KL, recipe.name)
    changed = [rows[0], {**rows[1], "spread": scoreboard_board.mark_of(get_recipe("rtn-w8a8"))}]
    assert not has(a_board(changed), recipe, KL, recipe.name)
    monkeypatch.setattr(scoreboard_board, "code_version", lambda: "another")
    assert not has(a_board(rows), recipe, KL, recipe.name)


def test_a_broken_recipe_is_told_and_costs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    failed: list[str] = []
    for name in ("good", "bad", "late"):
        with scoreboard_board.told(name, failed):
            if name == "bad":
                raise RuntimeError("broken recipe")
    assert failed == ["bad"] and "broken recipe" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    tried = []

    def sample(*args: Any) -> str:
        tried.append(args[6])
        if args[6] > 300:
            raise torch.OutOfMemoryError("full")
        return "graphs"

    monkeypatch.setattr(scoreboard_samples, "sample_ids", sample)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    board = SimpleNamespace(samples=1000, seed=1, steps=5)
    assert scoreboard_samples.draw(SimpleNamespace(config=None), board, "x")[0] == "graphs"  # type: ignore[arg-type]
    assert tried == [1000, 500, 250]


def test_of_two_rows_of_a_figure_the_one_of_more_molecules_counts_then_the_later() -> None:
    many, few = row("rtn-w4a4", KL, 33.0, n=2000), row("rtn-w4a4", KL, 31.0, n=100)
    assert scoreboard_merge.merged([many], [few]) == [many]
    assert scoreboard_merge.merged([few], [many]) == [many]
    again = {**many, "value": 32.0}
    assert scoreboard_merge.merged([many], [again, few]) == [again]


def test_kept_samples_are_judged_once_under_the_hardware_that_drew_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.models.test_quality import ROWS, table

    case = "rtn-w4a4, 5 samples, 3 steps"
    write_rows(
        tmp_path / "run" / "k0" / "scoreboard-nvidia-h200.json",
        [row(case, scoreboard_merge.RATE, 9.0, "1/s", hardware="NVIDIA H200")],
    )
    (tmp_path / "run" / "tables").mkdir()
    pq.write_table(table(*ROWS), tmp_path / "run" / "tables" / "rtn-w4a4-5-samples-3-steps.parquet")
    smiles = ["CCO", "CCN", "CCC"]
    monkeypatch.setattr(scoreboard_merge, "held_out_smiles", lambda: smiles)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "run"), "--results", str(tmp_path / "results")])
    scoreboard_merge.main()
    found = {r["metric"]: r for r in read_rows(tmp_path / "results" / "scoreboard-nvidia-h200.json")}
    assert found["validity"]["value"] == pytest.approx(60) and found["validity"]["hardware"] == "NVIDIA H200"
    assert found["validity"]["baseline"].startswith("judged on ") and scoreboard_merge.RATE in found
    assert "judged here" in capsys.readouterr().out
    scoreboard_merge.main()
    assert "judged here" not in capsys.readouterr().out


def test_rows_from_elsewhere_name_no_folder_of_that_machine_and_the_commit_that_an_archive_lost() -> None:
    made = {
        **row("x", KL, 1.0),
        "commit": "0.1.0",
        "command": "python benchmarks/scoreboard.py --results /mnt/out-7/k0 --recipes a b --samples 9",
    }
    tidied = scoreboard_merge.tidy(made, "abc123")
    assert tidied["command"] == "python benchmarks/scoreboard.py --results k0 --recipes a b --samples 9"
    assert (
        tidied["commit"] == "0.1.0+gabc123"
        and scoreboard_merge.tidy(tidied, "other")["commit"] == "0.1.0+gabc123"
    )
    page = scoreboard_page.section([tidied])
    assert "`python benchmarks/scoreboard.py --recipes ... --samples 9`" in page
