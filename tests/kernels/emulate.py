"""Kernels on the CPU: the launcher of the tests. Compiles a .cu with g++ against emulator/ and runs it fiber by fiber.

Guarantees: the same sources, the same arguments, a block at a time; every byte of shared memory starts as NaN.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitdgdm.kernels.build import SOURCES, source_text
from bitdgdm.kernels.launch import arguments

HERE = Path(__file__).resolve().parent / "emulator"


class Emulator:
    """A Launcher whose device is the CPU."""

    device = torch.device("cpu")

    def __init__(
        self, defines: Mapping[str, Mapping[str, int]] | None = None, multiprocessors: int = 2, shared_bytes: int = 232448,
        arch: str = "90a",
    ) -> None:  # fmt: skip
        self.arch = arch
        self.multiprocessors, self.shared_bytes, self._defines = multiprocessors, shared_bytes, defines or {}
        self._libraries: dict[str, ctypes.CDLL] = {}

    def _library(self, source: str) -> ctypes.CDLL:
        if source not in self._libraries:
            flags = [f"-D{k}={v}" for k, v in self._defines.get(source, {}).items()]
            files = [SOURCES / f"{source}.cu", HERE / "emulator.cpp"]
            text = "\0".join([*flags, source_text(f"{source}.cu"), *(f.read_text() for f in sorted(HERE.iterdir()))])
            folder = Path(tempfile.gettempdir()) / f"bitdgdm-emulator-{os.getuid()}"
            folder.mkdir(exist_ok=True)
            path = folder / f"{source}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
            if not path.is_file():
                made = path.with_suffix(f".{os.getpid()}")
                command = ["g++", "-std=c++17", "-O1", "-fno-fast-math", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
                command += ["-Wno-unknown-pragmas", "-DBITDGDM_EMULATE", *flags, "-I", str(HERE), "-I", str(SOURCES)]
                command += ["-o", str(made), "-x", "c++", *map(str, files)]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                os.replace(made, path)
            self._libraries[source] = ctypes.CDLL(str(path))
        return self._libraries[source]

    def launch(
        self, source: str, kernel: str, grid: int, block: int, shared: int, args: Sequence[Tensor | int | None]
    ) -> None:
        """See `Launcher.launch`."""
        assert shared <= self.shared_bytes, (kernel, shared)
        library = self._library(source)
        values = arguments(args)
        assert len(values) <= 20
        words = (ctypes.c_uint64 * 20)(*values)
        function = ctypes.cast(getattr(library, kernel), ctypes.c_void_p)
        library.emulate(function, grid, block, shared, words)
