"""Run: pytest tests/pipelines/test_submit.py"""

from pathlib import Path

import pytest

from bitdgdm.infra.errors import BadInput, BitDGDMError
from bitdgdm.pipelines.generate import run_campaign
from bitdgdm.pipelines.spec import make_spec
from bitdgdm.pipelines.status import read_status
from bitdgdm.pipelines.submit import open_campaign, resume_campaign

SPEC = {"model": "builtin:digress-qm9", "count": 4, "steps": 2, "unit_size": 4, "micro_batch": 4, "executor": "local",
        "alerts": False, "device": "cpu"}  # fmt: skip


def test_a_relative_place_means_the_same_for_a_worker_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    campaign, store = open_campaign(make_spec(SPEC | {"out": "out"}))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_campaign(campaign, store, quiet=True).finished
    assert (tmp_path / "out/_SUCCESS").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_a_campaign_that_was_moved_is_read_and_resumed_where_it_is(tmp_path: Path) -> None:
    open_campaign(make_spec(SPEC | {"out": str(tmp_path / "old")}))
    (tmp_path / "old").rename(tmp_path / "new")
    here = str(tmp_path / "new")
    assert run_campaign(*resume_campaign(here, {}), quiet=True).finished
    assert read_status(here).out == here and not (tmp_path / "old").exists()


@pytest.mark.parametrize(
    "wrong", [{"model": "no-such-file"}, {"steps": 501}, {"score": "beauty"}, {"novelty": "no-file"}]
)
def test_bad_input_leaves_no_folder_behind(tmp_path: Path, wrong: dict[str, object]) -> None:
    out = tmp_path / "out"
    with pytest.raises(BitDGDMError):
        open_campaign(make_spec(SPEC | {"out": str(out)} | wrong))
    assert not out.exists()


def test_a_resume_of_nothing_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        resume_campaign(str(tmp_path / "out"), {})
    assert not (tmp_path / "out").exists()
