"""Run: pytest tests/pipelines/test_progress.py"""

import os
import pty
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from bitdgdm.infra.log import configure, get_logger
from bitdgdm.pipelines.progress import ProgressBar

configure()
with ProgressBar("title", 10, "molecules") as bar:
    bar.update(5)
    get_logger("x").info("a line of the log")
    bar.update(10)
"""


def _on_a_terminal(program: str) -> str:
    ours, theirs = pty.openpty()
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "TERM": "xterm",
        "COLUMNS": "120",
    }
    subprocess.run(
        [sys.executable, "-c", program], env=env, stderr=theirs, stdout=theirs, check=True, timeout=60
    )
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # Linux says EIO when the other side is closed
        pass
    os.close(ours)
    return seen.decode()


def test_a_log_line_gets_a_line_of_its_own_above_the_progress_bar() -> None:
    seen = _on_a_terminal(PROGRAM)
    line = next(line for line in seen.splitlines() if "a line of the log" in line)
    assert "title" not in line.rpartition("\x1b[2K")[2], "the bar is wiped before the log line is written"
    assert "10/10" in seen
