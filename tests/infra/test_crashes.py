"""Campaigns killed by SIGKILL at every step or raced by two processes. Run: pytest tests/infra/test_crashes.py"""

import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest

from bitdgdm.infra import commit
from bitdgdm.infra.storage import open_store

PROGRAM = Path(__file__).with_name("campaign_process.py")
ROOT = Path(__file__).resolve().parents[2]
STEPS = (  # of a campaign of two units, in the order of its changes to the store
    "before data",
    "after data",
    "after record",
    "after second data",
    "after second record",
    "after manifest",
    "after success",
)


def load_program():
    spec = importlib.util.spec_from_file_location("campaign_process", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_campaign, shard_of = load_program().run_campaign, load_program().shard_of


def start(url: str, units: int, *more: int) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), url, str(units), *map(str, more)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_ready(process: subprocess.Popen) -> None:
    assert process.stdout.readline() == "ready\n", process.communicate(timeout=60)[1]


def expected_digest(units: int) -> str:
    lines = [f"{unit}:{hashlib.sha256(shard_of(unit)).hexdigest()}\n" for unit in range(units)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def assert_nothing_wrong_is_visible(store) -> None:
    """What a reader may find at any time: whole shards, at most one a unit, each as its record says."""
    records = commit.read_commits(store)
    assert [store.read(key) for key in commit.visible_shards(store)] == [shard_of(unit) for unit in records]


def assert_undisturbed(store, units: int) -> None:
    assert commit.read_manifest(store).digest == expected_digest(units)
    named = {record.path for record in commit.read_commits(store).values()}
    assert set(store.list("data/")) == named == set(commit.visible_shards(store)) and len(named) == units
    assert store.exists("_SUCCESS")


@pytest.fixture(params=["disk", "s3"])
def url(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "campaign")
    request.getfixturevalue("aws")(request.getfixturevalue("s3_endpoint"))
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.mark.parametrize(
    ("url", "step"),
    [
        *(("disk", step) for step in STEPS),
        ("s3", "after data"),
        ("s3", "after record"),
        ("s3", "after manifest"),
    ],
    indirect=["url"],
)
def test_a_process_killed_at_a_step_is_made_good_by_a_rerun(url, step):
    store = open_store(url)
    store.write(commit.shard_key(0, "orphaned"), b"orphan")  # so that a change follows the last step
    process = start(url, 2, STEPS.index(step))
    wait_ready(process)
    process.communicate("go\n", timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert_nothing_wrong_is_visible(store)
    run_campaign(store, 2, skip_done=True)
    assert_undisturbed(store, 2)


def test_a_process_killed_at_any_system_call_is_made_good_by_a_rerun(tmp_path):
    """Every call that changes the disk is the last one once; the child is a fork, killed for real."""
    killed, call = True, 0
    while killed:
        store = open_store(tmp_path / str(call))
        store.write(commit.shard_key(1, "orphaned"), b"orphan")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                kill_before_call(call)
                run_campaign(store, 2, skip_done=True)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert_nothing_wrong_is_visible(store)
        run_campaign(store, 2, skip_done=True)
        assert_undisturbed(store, 2)
        call += 1
    assert call > 20


def kill_before_call(number: int) -> None:
    left = [number]

    def mortal(original):
        def call(*arguments, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return original(*arguments, **options)

        return call

    for name in ("fsync", "link", "replace", "unlink", "mkdir"):
        setattr(os, name, mortal(getattr(os, name)))


def test_two_processes_on_the_same_units_commit_each_once(url):
    units = 12
    processes = [start(url, units) for _ in range(2)]
    for process in processes:
        wait_ready(process)
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    outcomes = [json.loads(output) for output, _ in answers]
    for unit in range(units):
        assert Counter(outcome[str(unit)] for outcome in outcomes) == {"committed": 1, "duplicate": 1}
    assert_undisturbed(open_store(url), units)
