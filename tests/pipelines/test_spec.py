"""Run: pytest tests/pipelines/test_spec.py"""

from pathlib import Path
from typing import Any

import pytest

from bitdgdm.infra.errors import SpecInvalid
from bitdgdm.pipelines.spec import IDENTITY, CampaignSpec, make_spec, read_spec

GOOD = {"model": "builtin:digress-qm9", "out": "out", "count": 10}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": 0}, "count"),
        ({"count": -5}, "count"),
        ({"count": "many"}, "count"),
        ({"seed": 2**64}, "seed"),
        ({"steps": 1}, "steps"),
        ({"unit_size": 0}, "unit_size"),
        ({"device": "tpu"}, "device"),
        ({"molecules": 5}, "molecules"),
        ({"gpus_per_worker": 0}, "gpus_per_worker"),
    ],
)
def test_an_impossible_value_is_refused_by_the_name_of_its_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecInvalid) as refused:
        make_spec(GOOD | change)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(SpecInvalid) as refused:
        make_spec({"count": 0, "colour": "red"})
    assert len(refused.value.problems) == 4  # count, colour, and the missing model and out


def test_a_spec_file_is_read_as_yaml_or_json(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: m\nout: o\ncount: 5\n")
    (tmp_path / "a.json").write_text('{"model": "m", "out": "o", "count": 5}')
    assert make_spec(read_spec(tmp_path / "a.yaml")) == make_spec(read_spec(tmp_path / "a.json"))


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "count: [\n", "\x00", "!!python/object/apply:os.system ['true']\n", ""]
)
def test_a_file_that_is_no_mapping_is_refused_and_nothing_in_it_runs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecInvalid) as refused:
        read_spec(path)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match="no such file"):
        read_spec(tmp_path / "absent.yaml")


def test_speed_knobs_are_not_part_of_the_identity() -> None:
    knobs = {"out", "workers", "gpus_per_worker", "max_attempts", "executor", "model"}
    assert set(IDENTITY) == set(CampaignSpec.model_fields) - knobs
