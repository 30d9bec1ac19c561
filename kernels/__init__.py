"""CUDA sources, their build and launch through PyCUDA, and a reference twin for every kernel."""

if __name__ != "bitdgdm.kernels":
    raise ImportError(f"this folder is bitdgdm.kernels, not {__name__!r}: import it as bitdgdm.kernels")
