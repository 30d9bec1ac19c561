"""Run: .venv/bin/python -m pytest tests/pipelines/test_doctor.py -q"""

import sys
from pathlib import Path

import pytest

from bitdgdm.infra.errors import KernelsUnavailable
from bitdgdm.kernels import build, toolchain
from bitdgdm.pipelines import doctor


def kernel_checks(monkeypatch: pytest.MonkeyPatch, run: object = lambda: "tried") -> dict[str, doctor.Check]:
    monkeypatch.setattr(doctor, "_run_kernels", run)
    monkeypatch.setattr(doctor, "version", lambda _: "2026.1")
    return {check.name: check for check in doctor._kernels()}


@pytest.fixture
def whole_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with everything but a GPU."""
    monkeypatch.setitem(sys.modules, "pycuda", type(sys)("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", type(sys)("pycuda.driver"))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Build cuda_13.0.r13.0\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("BITDGDM_KERNEL_CACHE", str(tmp_path / "new" / "cache"))
    for module in (build, toolchain):
        monkeypatch.setattr(module, "find_nvcc", lambda: str(nvcc))
    return monkeypatch


def test_a_whole_machine_has_its_kernels_tried(whole_machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checks = kernel_checks(whole_machine)
    assert [c.level for c in checks.values()] == ["ok"] * 5
    assert "cuda_13.0" in checks["nvcc"].found and checks["kernels"].found == "tried"
    assert not (tmp_path / "new").exists()


def test_what_is_missing_is_a_note_with_its_fix_and_nothing_is_tried(
    whole_machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run() -> str:
        pytest.fail("tried without a compiler")

    whole_machine.setitem(sys.modules, "pycuda.driver", None)
    for module in (build, toolchain):
        whole_machine.setattr(module, "find_nvcc", lambda: None)
    checks = kernel_checks(whole_machine, run)
    assert "kernels" not in checks
    assert checks["nvcc"].level == checks["pycuda"].level == "note"
    assert (
        "BITDGDM_KERNEL_CACHE" in checks["nvcc"].fix and "pip install 'bitdgdm[gpu]'" in checks["pycuda"].fix
    )
    (tmp_path / "ready.cubin").touch()
    whole_machine.setenv("BITDGDM_KERNEL_CACHE", str(tmp_path))
    assert kernel_checks(whole_machine, run)["nvcc"].level == "ok"


def test_a_cache_folder_that_cannot_be_written_is_told(whole_machine: pytest.MonkeyPatch) -> None:
    whole_machine.setenv("BITDGDM_KERNEL_CACHE", "/proc/nowhere")
    check = kernel_checks(whole_machine)["kernel cache"]
    assert check.level == "note" and "BITDGDM_KERNEL_CACHE" in check.fix


def test_kernels_that_do_not_run_are_a_problem(whole_machine: pytest.MonkeyPatch) -> None:
    def run() -> str:
        raise KernelsUnavailable("nvcc can't compile node.cu")

    check = kernel_checks(whole_machine, run)["kernels"]
    assert check.level == "problem" and "node.cu" in check.found
