"""What the kernels need of a machine besides a GPU, and what of it is missing.

Guarantees: nothing is compiled or left behind, no GPU is touched; every reason ends with the way out.
Knows nothing of: which network will run.
"""

import importlib
import tempfile

from bitdgdm.kernels.build import cache_folder, compiler_version, find_nvcc


def pycuda_missing() -> str:
    """Why PyCUDA can't be used, or ""."""
    try:
        importlib.import_module("pycuda.driver")
    except ImportError as e:  # also: it is there and finds no driver library
        return f"PyCUDA can't be imported ({e}); install it with: pip install 'bitdgdm[gpu]'"
    return ""


def compiler_missing() -> str:
    """Why no kernel can be compiled and none is there ready-made, or ""."""
    if find_nvcc() is None and not any(cache_folder().glob("*.cubin")):
        return (
            f"there is no nvcc and no compiled kernel in {cache_folder()}; install the CUDA toolkit and put nvcc on the "
            "PATH or set CUDA_HOME, or pip install 'cuda-toolkit[nvcc]', or copy a cache folder here and name it with BITDGDM_KERNEL_CACHE"
        )
    return ""


def cache_unwritable() -> str:
    """Why compiled kernels can't be kept, or ""."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # permissions alone don't tell: a mount may be read-only
            return ""
    except OSError as e:
        return f"{cache_folder()} can't be written ({e.strerror}); name a folder that can with BITDGDM_KERNEL_CACHE"


def missing() -> str:
    """The first thing that the kernels lack on this machine, or ""."""
    return pycuda_missing() or compiler_missing() or (cache_unwritable() if find_nvcc() else "")


def compiler() -> str:
    """Path and build of nvcc, or what stands in for it."""
    nvcc = find_nvcc()
    return f"{nvcc}, {compiler_version(nvcc)}" if nvcc else f"no nvcc, compiled kernels in {cache_folder()}"
