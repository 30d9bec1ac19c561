"""Run: pytest tests/tasks/test_score_unit.py"""

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest
import torch

from bitdgdm.models import alerts
from bitdgdm.models.sampler import Graphs
from bitdgdm.models.source import load_source
from bitdgdm.tasks.score_unit import Scorer, Scoring, processes, to_shard

PROGRAM = """
import sys
from bitdgdm.models.source import load_source
from bitdgdm.tasks.score_unit import Scorer, Scoring
import torch
from bitdgdm.models.sampler import Graphs

if __name__ == "__main__":
    scorer = Scorer(Scoring(load_source("builtin:digress-qm9").config, None, "qed", False), 2)
    one = torch.ones(1, dtype=torch.int64)
    scorer.table(Graphs(one, torch.zeros(1, 9, dtype=torch.int8), torch.zeros(1, 9, 9, dtype=torch.int8)), 0)
    print("ready", flush=True)
    sys.stdin.read()
"""


def _carbons(count: int) -> Graphs:
    zeros = torch.zeros(count, 9, 9, dtype=torch.int8)
    return Graphs(torch.ones(count, dtype=torch.int64), zeros[:, 0], zeros)


def _server() -> psutil.Process:
    return next(c for c in psutil.Process().children() if "forkserver" in " ".join(c.cmdline()))


@pytest.mark.parametrize("lost", ["a process", "the server"])
def test_a_pool_that_lost_a_process_serves_the_next_attempt(lost: str) -> None:
    scoring = Scoring(load_source("builtin:digress-qm9").config, None, "qed", False)
    scorer = Scorer(scoring, 2)
    expected = scoring.table(_carbons(300), 5)
    assert scorer.table(_carbons(300), 5) == expected
    if lost == "a process":
        for child in _server().children():
            child.kill()
    else:
        server = _server()
        server.kill()
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)  # dead, and left for multiprocessing to find
    with pytest.raises(BrokenProcessPool):
        scorer.table(_carbons(300), 5)
    assert scorer.table(_carbons(300), 5) == expected


def _screens_read() -> int:
    return alerts._screen.cache_info().currsize


def test_a_new_process_has_read_the_catalogues_of_alerts() -> None:
    with ProcessPoolExecutor(1, processes()) as pool:
        assert pool.submit(_screens_read).result() == 1


def test_batches_that_are_scored_at_once_make_the_shard_of_the_whole() -> None:
    scoring = Scoring(load_source("builtin:digress-qm9").config, None, "qed", False)
    scorer = Scorer(scoring, 2)
    begun = [scorer.begin(_carbons(count), first) for first, count in ((5, 300), (305, 1), (306, 40))]
    parts = [rows() for rows in reversed(begun)][::-1]
    assert to_shard(parts, {"unit": 1}) == to_shard([scoring.table(_carbons(341), 5)], {"unit": 1})


def test_the_processes_of_a_killed_worker_end_too(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(program)], env=env, text=True, **pipes) as worker:
        assert worker.stdout and worker.stdout.readline() == "ready\n"
        children = psutil.Process(worker.pid).children(recursive=True)
        assert children
        worker.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
