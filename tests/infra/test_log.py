"""Run: pytest tests/infra/test_log.py"""

import json
import logging
import sys

import pytest

from bitdgdm.infra import log


@pytest.fixture(autouse=True)
def unconfigured():
    yield
    root = log.get_logger()
    root.handlers.clear()
    root.propagate = True
    root.setLevel(logging.NOTSET)


def test_each_record_is_one_json_line_on_stderr_with_the_unit_at_the_end(capsys):
    log.configure(json=True)
    log.get_logger("tasks.sample").info(
        "done\nwith %d", 3, extra={"unit": 7, "campaign": "c", "attempt": "ab"}
    )
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    line = json.loads(output.err)
    assert (line["level"], line["logger"], line["message"]) == (
        "INFO",
        "bitdgdm.tasks.sample",
        "done\nwith 3",
    )
    assert (line["campaign"], line["attempt"], line["unit"]) == ("c", "ab", 7) and list(line)[-1] == "unit"


def test_an_exception_stays_on_the_line(capsys):
    log.configure(json=True)
    try:
        raise ValueError("boom")
    except ValueError:
        log.get_logger().exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: boom" in json.loads(line)["exception"]


def test_without_a_terminal_the_log_is_json_and_with_one_it_is_for_people(capsys, monkeypatch):
    log.configure()
    log.get_logger().warning("plain")
    assert json.loads(capsys.readouterr().err)["message"] == "plain"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log.configure()
    log.get_logger().warning("for people")
    output = capsys.readouterr()
    assert output.out == "" and "for people" in output.err and not output.err.startswith("{")


def test_configuring_again_replaces_and_the_level_is_kept(capsys, monkeypatch):
    monkeypatch.setenv("BITDGDM_LOG_LEVEL", "warning")
    for _ in range(3):
        log.configure(json=True)
    log.get_logger().info("hidden")
    log.get_logger().warning("once")
    assert capsys.readouterr().err.count("\n") == 1
    log.configure(json=True, level="DEBUG")
    log.get_logger().debug("shown")
    assert "shown" in capsys.readouterr().err


def test_names_live_below_one_root():
    assert log.get_logger("models").name == log.get_logger("bitdgdm.models").name == "bitdgdm.models"
    assert log.get_logger().name == "bitdgdm"
