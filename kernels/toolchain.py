"""Can the kernels be built and run here?

Guarantees: `missing` starts nothing on a GPU and compiles nothing; `self_test` compiles every source for a device,
runs one small network through all kernels and compares graphs that must be equal.
Knows nothing of: which model will run.
"""

import importlib.util
import os

from bitdgdm.kernels.build import cache_folder, find_nvcc


def pycuda_missing() -> str:
    """Why PyCUDA isn't there, or ""."""
    if importlib.util.find_spec("pycuda") is None:
        return "PyCUDA is not installed (pip install 'bitdgdm[gpu]')"
    return ""


def compiler_missing() -> str:
    """Why nothing can be compiled and nothing ready-made is there, or ""."""
    if find_nvcc() is None and not any(cache_folder().glob("*.cubin")):
        return f"there is no nvcc and no compiled kernel in {cache_folder()} (install the CUDA toolkit)"
    return ""


def cache_unwritable() -> str:
    """Why compiled kernels can't be kept, or ""."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    return (
        "" if os.access(folder, os.W_OK) else f"{cache_folder()} can't be written (set BITDGDM_KERNEL_CACHE)"
    )


def missing() -> str:
    """The first thing that the kernels lack on this machine, or ""."""
    return pycuda_missing() or compiler_missing()
