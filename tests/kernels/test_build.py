"""Run: .venv/bin/python -m pytest tests/kernels/test_build.py -q   (most of it needs nvcc; no GPU)"""

import multiprocessing
import shutil
from pathlib import Path

import pytest

from bitdgdm.kernels import build as builder
from bitdgdm.kernels.build import CompilerMissing, KernelBroken, build, find_nvcc

needs_nvcc = pytest.mark.skipif(
    find_nvcc() is None or shutil.which("g++") is None, reason="needs nvcc (pip install 'cuda-toolkit[nvcc]') and g++"
)
SOURCE = '#include "one.cuh"\nextern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one.cuh").write_text('#pragma once\n#include "two.cuh"\n')
    (tmp_path / "two.cuh").write_text("#pragma once\n")
    (tmp_path / "toy.cu").write_text(SOURCE)
    return tmp_path


def build_toy(folder: Path, factor: int = 2, arch: str = "90a") -> Path:
    return build("toy", arch, {"FACTOR": factor}, folder=folder, cache_in=folder / "cache").path


@needs_nvcc
def test_whatever_decides_the_machine_code_decides_the_file(folder: Path) -> None:
    first = build_toy(folder)
    assert build_toy(folder) == first
    others = {first, build_toy(folder, factor=3), build_toy(folder, arch="80")}
    (folder / "two.cuh").write_text("#pragma once\n// an include of an include\n")
    others.add(build_toy(folder))
    assert len(others) == 4


@needs_nvcc
def test_a_ready_cubin_is_not_compiled_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_toy(folder)
    monkeypatch.setattr(builder, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build_toy(folder) == path


@needs_nvcc
def test_processes_that_build_at_once_leave_one_whole_file(folder: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        paths = pool.map(build_toy, [folder] * 4)
    assert len(set(paths)) == 1
    assert sorted(p.suffix for p in (folder / "cache").iterdir()) == [".cubin", ".txt"]
    assert paths[0].read_bytes()[:4] == b"\x7fELF"


@needs_nvcc
def test_a_broken_source_is_reported_with_its_name_and_the_compilers_words(folder: Path) -> None:
    (folder / "toy.cu").write_text(SOURCE.replace("x[threadIdx.x]", "y[threadIdx.x]"))
    with pytest.raises(KernelBroken, match=r"toy\.cu") as caught:
        build_toy(folder)
    assert 'identifier "y" is undefined' in str(caught.value)
    assert not list((folder / "cache").glob("*.cubin"))


@needs_nvcc
def test_a_cubin_from_elsewhere_needs_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_toy(folder)
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    assert build_toy(folder) == path


def test_without_compiler_and_cubin_the_way_out_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    with pytest.raises(CompilerMissing, match="BITDGDM_KERNEL_CACHE"):
        build_toy(folder)
