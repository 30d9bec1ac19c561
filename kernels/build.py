"""CUDA source to cubin: compiled once per (source, includes, flags, compiler, architecture), by whoever comes first.

Guarantees: the cache key is a hash of everything that decides the result; a cubin appears whole or not at all (temporary
file, fsync, rename), so any number of processes may compile into one folder at the same time; a cubin that was built
elsewhere and put into the folder is used without a compiler.
Knows nothing of: PyCUDA, devices, what a kernel computes. Errors are its own (the floor knows no other).
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "86", "89", "90a")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_RESOURCES = re.compile(
    r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


class CompilerMissing(RuntimeError):
    """There is no nvcc, and the cubin is not in the cache."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.folder = source, folder
        super().__init__(
            f"{source} is not compiled in {folder} and there is no nvcc. Install the CUDA toolkit and put nvcc on the "
            "PATH (or set CUDA_HOME), or pip install 'cuda-toolkit[nvcc]', or copy a cache folder here and name it with "
            "BITDGDM_KERNEL_CACHE"
        )


class KernelBroken(RuntimeError):
    """nvcc refused a source; `output` is what it said."""

    def __init__(self, source: str, command: str, output: str) -> None:
        self.source, self.command, self.output = source, command, output
        super().__init__(f"nvcc can't compile {source}:\n{output.strip()}\nThe command was: {command}")


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel."""

    kernel: str
    registers: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Cubin:
    """Machine code on disk and the compiler's report beside it."""

    path: Path
    report: str

    @property
    def resources(self) -> dict[str, Resources]:
        """Registers, stack and spills of every kernel in the cubin, by name."""
        found = (m.groups() for m in _RESOURCES.finditer(self.report))
        return {
            name: Resources(name, int(registers), int(stack), int(stores) + int(loads))
            for name, stack, stores, loads, registers in found
        }


def cache_folder() -> Path:
    """BITDGDM_KERNEL_CACHE, or kernels/ in BITDGDM_HOME (~/.bitdgdm)."""
    home = os.environ.get("BITDGDM_HOME") or str(Path.home() / ".bitdgdm")
    return Path(os.environ.get("BITDGDM_KERNEL_CACHE") or Path(home) / "kernels")


def find_nvcc() -> str | None:
    """Path of the compiler: in CUDA_HOME or CUDA_PATH, on the PATH, where the toolkit installs itself, or from PyPI."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for root in filter(None, roots):
        if (Path(root) / "bin" / "nvcc").is_file():
            return str(Path(root) / "bin" / "nvcc")
    return find_tool("nvcc")


def find_tool(name: str) -> str | None:
    """Path of a program of the toolkit: on the PATH, where the toolkit installs itself, or from its PyPI packages."""
    places = [None, "/usr/local/cuda/bin"]
    packages = importlib.util.find_spec("nvidia")
    for root in (packages and packages.submodule_search_locations) or ():
        places += [str(folder) for folder in sorted(Path(root).glob("cu*/bin"))]
    return next(filter(None, (shutil.which(name, path=place) for place in places)), None)


@cache
def compiler_version(nvcc: str) -> str:
    """The last line of `nvcc --version`, which names the build."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def source_text(name: str, folder: Path = SOURCES) -> str:
    """The source and the files that it includes, recursively, each once, as one text."""
    seen: dict[str, str] = {}
    todo = [name]
    while todo:
        current = todo.pop()
        if current not in seen and (folder / current).is_file():
            seen[current] = (folder / current).read_text(encoding="utf-8")
            todo += _INCLUDE.findall(seen[current])
    return "\0".join(f"{key}\0{seen[key]}" for key in sorted(seen))


def build(
    name: str,
    arch: str,
    defines: Mapping[str, int] | None = None,
    *,
    folder: Path = SOURCES,
    cache_in: Path | None = None,
) -> Cubin:
    """Return the cubin of kernels/<name>.cu for `arch` ("90a"), compiling it if the cache has none.

    defines: -D macros, part of the key. Raises: CompilerMissing, KernelBroken.
    """
    cache_in = cache_in or cache_folder()
    source = folder / f"{name}.cu"
    flags = ["-cubin", "-O3", "-std=c++17", "-Xptxas", "-v", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    flags += [f"-D{key}={value}" for key, value in sorted((defines or {}).items())]
    nvcc = find_nvcc()
    content = hashlib.sha256("\0".join([source_text(source.name, folder), *flags]).encode()).hexdigest()
    if nvcc is None:
        ready = sorted(cache_in.glob(f"{name}-{arch}-{content[:16]}-*.cubin"))
        if not ready:
            raise CompilerMissing(source.name, cache_in)
        return _read(ready[-1])
    compiler = hashlib.sha256(compiler_version(nvcc).encode()).hexdigest()
    path = cache_in / f"{name}-{arch}-{content[:16]}-{compiler[:8]}.cubin"
    if not path.is_file():
        _compile([nvcc, *flags, "-I", str(folder)], source, path)
    return _read(path)


def _read(path: Path) -> Cubin:
    report = path.with_suffix(".txt")
    return Cubin(path, report.read_text(encoding="utf-8") if report.is_file() else "")


def _compile(command: list[str], source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as work:
        made = Path(work) / "out.cubin"
        full = [*command, "-o", str(made), str(source)]
        done = subprocess.run(full, capture_output=True, text=True)
        if done.returncode != 0:
            raise KernelBroken(source.name, " ".join(full), done.stderr or done.stdout)
        report = Path(work) / "out.txt"
        report.write_text(done.stderr, encoding="utf-8")
        for file, place in ((report, path.with_suffix(".txt")), (made, path)):  # the cubin last: it is what is looked for
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, place)
