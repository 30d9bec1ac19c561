"""Run: .venv/bin/python -m pytest tests/models/test_importer_attacks.py -q

Files that mean harm: nothing in a pickle is executed, wherever in the file it stands.
"""

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bitdgdm.infra.errors import BitDGDMError, UnsafeCheckpoint
from bitdgdm.models.importer import import_checkpoint
from tests.models.test_importer import WEIGHTS, hydra_file, lightning

__all__ = ["hydra_file"]  # a fixture


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


def attacks(witness: Path) -> dict[str, object]:
    """Objects whose unpickling creates `witness`."""
    touch = f"open({str(witness)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, f"touch {witness}"),
        "exec": Calls(exec, touch),
        "eval": Calls(eval, touch),
        "open": Calls(open, str(witness), "w"),
        "Popen": Calls(subprocess.Popen, ["touch", str(witness)]),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "Path.touch": Calls(Path.touch, Calls(Path, str(witness))),
        "numpy.tofile": Calls(__import__("numpy").save, str(witness), [1]),
        "torch.save": Calls(torch.save, [1], str(witness)),
        "yaml": Calls(yaml.unsafe_load, f"!!python/object/apply:os.system ['touch {witness}']"),
    }


@pytest.mark.parametrize("place", ["top", "hyper_parameters", "state_dict"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("attack", sorted(attacks(Path("x"))))
def test_a_malicious_pickle_executes_nothing(
    tmp_path: Path, hydra_file: Path, attack: str, form: str, place: str
) -> None:
    witness, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    evil = attacks(witness)[attack]
    content: Any = lightning(WEIGHTS, {"cfg": evil} if place == "hyper_parameters" else {})
    if place == "state_dict":
        content["state_dict"]["model.evil"] = evil
    content = evil if place == "top" else content
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert not witness.exists()
    try:
        import_checkpoint(path, hydra_file)
    except BitDGDMError as error:
        assert error.exit_code == 2 and "\n" not in str(error)
    assert not witness.exists() and not (tmp_path / "executed.npy").exists()


def test_the_refusal_names_what_the_pickle_asked_for(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Calls(os.system, "true")}, tmp_path / "evil.ckpt")
    with pytest.raises(UnsafeCheckpoint, match=r"system.*nothing in it was executed"):
        import_checkpoint(tmp_path / "evil.ckpt")


def test_the_test_attacks_would_work_on_a_plain_unpickler(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    for name in ("os.system", "exec", "open", "Path.touch"):
        pickle.loads(pickle.dumps(attacks(witness)[name], protocol=2))  # noqa: S301
        assert witness.exists(), name
        witness.unlink()
