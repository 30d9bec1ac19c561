"""Run: .venv/bin/python -m pytest tests/pipelines/test_docs.py

The pages for users tell the truth: commands exist, tables list what is stored, snippets run, figures come from the
result files, links lead somewhere.
"""

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from bitdgdm.infra.commit import CommitRecord, Manifest
from bitdgdm.models.molecule import MOLECULE_SCHEMA
from bitdgdm.pipelines.campaign import Campaign
from bitdgdm.pipelines.cli import app
from bitdgdm.pipelines.spec import CampaignSpec, make_spec
from bitdgdm.pipelines.spec_reference import EXAMPLE, spec_page
from bitdgdm.quant.artifact import ArtifactHeader
from bitdgdm.quant.parts import PLAIN, LinearParts
from bitdgdm.quant.recipe_book import recipes
from tests.pipelines.fake_campaign import make_campaign

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app)


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of the indented and fenced blocks of a page."""
    yield from (line[4:] for line in text.split("\n") if line.startswith("    "))
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from block.split("\n")


def commands() -> Iterator[tuple[str, str]]:
    """Yield (page, command) for every `bitdgdm ...` of the pages; inside a sentence it may be a bare name."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        inline = [
            code if " " in code.removeprefix("bitdgdm ") else f"{code} --help"
            for code in re.findall(r"`([^`\n]+)`", text)
        ]
        for line in (*code_lines(text), *inline):
            if re.match(r"(\$ )?bitdgdm [a-z]", line):
                yield page.name, line.removeprefix("$ ").strip()


def accept(line: str) -> None:
    """Parse a command line with the real options. Raises: what the command line itself raises."""
    _, *arguments = shlex.split(line, comments=True)
    command, path = COMMANDS, []
    while hasattr(command, "commands"):
        assert arguments, f"{line} lacks a command"
        name = arguments.pop(0)
        assert name in command.commands, f"there is no command {' '.join([*path, name])}"
        command, path = command.commands[name], [*path, name]
    if arguments != ["--help"]:
        command.make_context(" ".join(path), arguments)


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_every_command_on_a_page_exists_with_its_options(page: str, line: str) -> None:
    accept(line)


@pytest.mark.parametrize(
    "line", ["bitdgdm generate --no-such-flag", "bitdgdm quantise x", "bitdgdm models", "bitdgdm status"]
)
def test_the_check_above_refuses_what_does_not_exist(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|no command|lacks a command|missing"):
        accept(line)


def test_the_pages_show_every_command_there_is() -> None:
    shown = {" ".join(line.split()[1:3]) if " models " in line else line.split()[1] for _, line in commands()}
    models = {f"models {name}" for name in COMMANDS.commands["models"].commands}  # type: ignore[attr-defined]
    assert shown >= (set(COMMANDS.commands) - {"models"}) | models  # type: ignore[attr-defined]


def test_the_readme_names_the_two_commands_and_fits_on_a_screen() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text
    written = re.sub(r"<!-- results .*?<!-- /results -->", "", text, flags=re.DOTALL)
    assert len(written.split("\n")) <= 60


def test_every_make_target_on_a_page_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = {w for line in code_lines(page.read_text()) for w in re.findall(r"^make ([a-z]+)", line)}
        assert named <= targets, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [
        link for link in links if not link.startswith("https://") and not (page.parent / link).exists()
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_named_on_a_page_exists(page: Path) -> None:
    named = set(re.findall(r"\b(?:rtn|bitdgdm)-w\d+a\d+[a-z0-9-]*", page.read_text(encoding="utf-8")))
    assert named <= {recipe.name for recipe in recipes()}


def test_what_quantize_takes_unasked_is_the_first_of_the_book_and_explained_as_the_default() -> None:
    (unasked,) = (p.default for p in COMMANDS.commands["quantize"].params if p.name == "recipe")
    assert unasked == recipes()[0].name
    assert f"**The default, `{unasked}`" in (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


def test_the_spec_page_is_that_of_the_schema() -> None:
    assert (ROOT / "docs" / "spec.md").read_text(encoding="utf-8") == spec_page(), "run make docs"


def test_the_spec_page_lists_a_flag_of_the_command_line_for_each_key() -> None:
    generate = COMMANDS.commands["generate"]  # type: ignore[attr-defined]
    known = {
        option for parameter in generate.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    flags = re.findall(r"^\| `(\w+)` \| ((?:`--[a-z-]+` ?)+)", spec_page(), re.MULTILINE)
    assert [key for key, _ in flags] == list(CampaignSpec.model_fields)
    assert {flag for _, found in flags for flag in re.findall(r"--[a-z-]+", found)} <= known


def test_the_example_spec_is_valid() -> None:
    assert make_spec(yaml.safe_load(EXAMPLE)).count == 100_000


def first_cells(title: str) -> list[list[str]]:
    """Return the cells of the table under a heading of docs/formats.md, without its head."""
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    table = next(block.strip() for block in section.split("\n\n") if block.strip().startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.split("\n")[2:]]


def test_the_columns_on_the_page_are_those_of_a_shard() -> None:
    cells = [(row[0].strip("`"), row[1]) for row in first_cells("Columns of a shard")]
    stored = [
        (field.name, re.sub(r"list<\w+: (\w+)>", r"list of \1", str(field.type))) for field in MOLECULE_SCHEMA
    ]
    assert cells == stored


@pytest.mark.parametrize(
    ("title", "fields"),
    [
        ("Commit record", list(CommitRecord.model_fields)),
        ("Manifest", list(Manifest.model_fields)),
        ("campaign.json", list(Campaign.model_fields)),
        ("Artifact", [f for f in ArtifactHeader.__dataclass_fields__ if f != "digest"]),
    ],
)
def test_the_fields_on_the_page_are_those_that_are_stored(title: str, fields: list[str]) -> None:
    assert sorted(row[0].strip("`") for row in first_cells(title)) == sorted(fields)


def test_the_tensors_on_the_page_are_those_of_a_layer() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    parts = set(LinearParts.__dataclass_fields__) - set(PLAIN)
    assert set(re.findall(r"`NAME\.(\w+)`", text)) == parts | {"bias", "tau"}


def test_a_campaign_folder_holds_what_the_page_says(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "out"), units=1)
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    block = text.split("## A campaign's folder")[1].split("\n\n")[1]
    named = [re.split(r"\s{2,}", line.strip())[0] for line in block.strip().split("\n")]
    pattern = "|".join(
        re.sub(r"<[^>]+>", "[0-9a-f]+", re.escape(name)).replace("000042", r"\d{6}") for name in named
    )
    assert [key for key in store.list() if not re.fullmatch(pattern, key)] == []


@pytest.mark.parametrize("page", ["quickstart.md", "formats.md"])
def test_the_snippets_of_a_page_run_on_a_campaign(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import duckdb

    make_campaign(str(tmp_path / "out"), units=2)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(sql|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    for language, code in blocks:
        if language == "sql":
            assert duckdb.execute(code).fetchall()
        else:
            names: dict = {}
            exec(code, names)
            assert len(names.get("best", "-")) and names.get("footer", {"seed": 7})[
                "unit" if "footer" in names else "seed"
            ] in (0, 7)


def results_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_results", ROOT / "benchmarks" / "results.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_table_of_results_is_what_the_result_files_give() -> None:
    script = results_script()
    rows = script.read_results()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert script.fill(text, rows) == text, f"{page.name}: run make results"


def row(metric: str, value: float, unit: str, **other: object) -> dict:
    base = {
        "question": "campaign", "case": "fp32, T=500", "baseline": "", "n": 10_000, "spread": "", "hardware": "H200",
        "versions": {"torch": "2.11"}, "commit": "0.1.0", "date": "2026-11-23", "command": "python x.py",
    }  # fmt: skip
    return {**base, "metric": metric, "value": value, "unit": unit, **other}


def test_a_table_has_one_line_a_case_and_hardware_and_keeps_the_text_around_it() -> None:
    script = results_script()
    page = "before\n<!-- results campaign: validity as Valid; speed as Molecules/s -->\nstale\n<!-- /results -->\nafter\n"
    rows = [
        row("validity", 99.716, "%", spread="99.59..99.80"), row("speed", 1234.5, "1/s"),
        row("validity", 98, "%", hardware="EPYC | 2 cores"), row("other", 1, "s"), row("validity", 1, "%", question="else"),
    ]  # fmt: skip
    assert script.fill(page, rows) == (
        "before\n<!-- results campaign: validity as Valid; speed as Molecules/s -->\n"
        "| case | hardware | Valid | Molecules/s |\n| --- | --- | ---: | ---: |\n"
        "| fp32, T=500 | H200 | 99.72 % (99.59 to 99.80) | 1,234 1/s |\n"
        "| fp32, T=500 | EPYC \\| 2 cores | 98.00 % |  |\n"
        "<!-- /results -->\nafter\n"
    )
    assert script.fill(script.fill(page, rows), rows) == script.fill(page, rows)


def test_without_results_a_table_says_how_to_get_them() -> None:
    assert "python benchmarks/campaign.py" in results_script().table("campaign: validity", [])


def test_a_file_that_is_no_list_of_result_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"question": "campaign"}]))
    with pytest.raises(ValueError, match=r"x\.json is not a list of rows"):
        results_script().read_results(tmp_path)
