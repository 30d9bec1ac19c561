"""Run: pytest tests/pipelines/test_console.py

Each case is a process of its own, as `run` ends the process and moves file descriptors.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import typer
from bitdgdm.infra.errors import StorageUnavailable
from bitdgdm.pipelines.console import out, reply, run, table

app = typer.Typer()

@app.command()
def go(json: bool = False) -> int:
    {body}
    return 0

run(app)
"""
FAILURES = [
    ("raise KeyboardInterrupt", 130, "continues it"),
    ("raise StorageUnavailable('s3://b', 'no route')", 75, "s3://b"),
    ("open('/no/such/place', 'w')", 2, "/no/such/place"),
    ("raise SystemError('a mistake of ours')", 1, "a mistake of ours"),
]


def _run(body: str, *args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "COLUMNS": "60"}
    program = [sys.executable, "-c", PROGRAM.format(body=body), *args]
    return subprocess.run(program, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)


@pytest.mark.parametrize(("body", "code", "word"), FAILURES)
def test_a_program_gets_one_document_and_the_exit_code_whatever_goes_wrong(
    body: str, code: int, word: str
) -> None:
    ended = _run(body, "--json")
    error = json.loads(ended.stdout)["error"]
    assert (ended.returncode, error["exit_code"]) == (code, code)
    assert word in error["message"]


@pytest.mark.parametrize(("body", "code", "word"), FAILURES[:3])
def test_a_program_that_went_away_changes_neither_the_code_nor_what_a_person_reads(
    body: str, code: int, word: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = _run(body, "--json", stdout=writer)
    os.close(writer)
    assert ended.returncode == code and word in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(("body", "code", "word"), FAILURES[:3])
def test_a_person_gets_one_line_for_what_is_not_our_mistake(body: str, code: int, word: str) -> None:
    ended = _run(body)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith("bitdgdm: ") and ended.stderr.count("\n") == 1 and word in ended.stderr


def test_a_mistake_of_ours_shows_its_traceback() -> None:
    assert "Traceback" in _run(FAILURES[3][0]).stderr


def test_a_row_of_a_table_is_one_whole_line_in_a_pipe() -> None:
    ended = _run("out.print(table(('model', 'made from'), [('m' * 90, 'f' * 90)]))")
    assert ended.stdout.splitlines()[1].split() == ["m" * 90, "f" * 90]


def test_brackets_in_a_name_are_printed_as_they_are() -> None:
    ended = _run("out.print('runs[red]/a'); out.print(table(('path',), [('runs[red]/b',)]))")
    assert "runs[red]/a" in ended.stdout and "runs[red]/b" in ended.stdout


def test_the_help_of_a_command_shows_the_defaults() -> None:
    from typer.testing import CliRunner

    from bitdgdm.pipelines.cli import app

    told = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "120"}).output
    assert "[default: 0]" in told and "[default: one a core or GPU]" in told
