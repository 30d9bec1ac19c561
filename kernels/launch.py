"""Kernels on a device: PyCUDA loads cubins and launches them on a stream that torch shares.

Guarantees: PyCUDA works in torch's primary context, so tensors and kernels share memory; torch runs its own work on the
same stream inside `Device.stream()`, so launches and torch operations are ordered and can be captured in one CUDA graph.
PyCUDA is imported when a Device is made, never before.
Knows nothing of: what a kernel computes; how a cubin is built.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitdgdm.kernels.build import build


class PyCudaMissing(RuntimeError):
    """PyCUDA can't be imported, or finds no driver."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"the CUDA kernels need PyCUDA: {reason}. Install it with: pip install 'bitdgdm[gpu]', on a machine with "
            "an NVIDIA driver and the CUDA toolkit (README, section GPU)"
        )


def arguments(args: Sequence[Tensor | int | None]) -> list[int]:
    """Pointers and ints of a launch. Raises: ValueError for a tensor that isn't contiguous."""
    for place, a in enumerate(args):
        if isinstance(a, Tensor) and not a.is_contiguous():
            raise ValueError(f"argument {place} of a kernel is not contiguous: shape {list(a.shape)}, strides {a.stride()}")
    return [a.data_ptr() if isinstance(a, Tensor) else (a or 0) for a in args]


class Launcher(Protocol):
    """Runs kernels by (source, name); a Device does it on a GPU."""

    device: torch.device
    arch: str  # "89", "90a"
    multiprocessors: int
    shared_bytes: int  # the most a block may use

    def launch(
        self, source: str, kernel: str, grid: int, block: int, shared: int, args: Sequence[Tensor | int | None]
    ) -> None:
        """Queue a kernel. Tensors are passed as pointers, None as the null pointer, ints as 32-bit ints."""
        ...


class Device:
    """One CUDA device."""

    def __init__(self, index: int = 0) -> None:
        """Raises: PyCudaMissing; a launch raises what `build` raises."""
        torch.zeros(1, device=f"cuda:{index}")  # torch makes the primary context first
        try:
            import pycuda.driver as driver
        except ImportError as missing:
            raise PyCudaMissing(str(missing)) from missing
        driver.init()
        self._driver = driver
        self._context = driver.Device(index).retain_primary_context()
        self.defines: Mapping[str, Mapping[str, int]] = {}  # macros of each source; set before its first launch
        self.device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.warm_for: list[weakref.ref[Any]] = []  # networks whose kernels are loaded
        self.capturing = threading.Lock()  # held while the stream captures, and to give back pinned memory it has used
        self.multiprocessors = properties.multi_processor_count
        self.shared_bytes = driver.Device(index).get_attribute(
            driver.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        )
        self.arch = {(9, 0): "90a"}.get((properties.major, properties.minor), f"{properties.major}{properties.minor}")
        with self._current():
            self._stream = driver.Stream()
        self._shared_stream = torch.cuda.ExternalStream(self._stream.handle, device=self.device)
        self._apart_stream = torch.cuda.Stream(self.device)
        self._module = cache(self._load)
        self._function = cache(self._prepare)
        self._room: dict[tuple[str, str], int] = {}  # shared memory that a block of each kernel may have

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()

    @contextmanager
    def stream(self, *, join: bool = True) -> Iterator[torch.cuda.Stream]:
        """Make the launch stream torch's current stream; it waits for the work queued before.

        join: what is queued afterwards on the stream that was current waits for it in turn; without, the caller waits
        for an event.
        """
        outer = torch.cuda.current_stream(self.device)
        self._shared_stream.wait_stream(outer)
        with torch.cuda.stream(self._shared_stream):
            yield self._shared_stream
        if join:
            outer.wait_stream(self._shared_stream)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Make current a stream that waits for nobody: to prepare a batch while another one runs.

        The default stream would wait: launches are on a stream of the kind that it synchronizes with.
        """
        with torch.cuda.stream(self._apart_stream):
            yield

    def _load(self, source: str) -> Any:
        path: Path = build(source, self.arch, self.defines.get(source)).path
        return self._driver.module_from_file(str(path))

    def _prepare(self, source: str, kernel: str, signature: str, shared: int) -> Any:
        function = self._module(source).get_function(kernel)
        room = max(shared, self._room.get((source, kernel), 48 << 10))  # never less than a launch before had
        if room > 48 << 10:
            attribute = self._driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
            function.set_attribute(attribute, room)
        self._room[source, kernel] = room
        function.prepare(signature)
        return function

    def launch(
        self, source: str, kernel: str, grid: int, block: int, shared: int, args: Sequence[Tensor | int | None]
    ) -> None:
        """See `Launcher.launch`."""
        signature = "".join("i" if isinstance(a, int) else "P" for a in args)
        values = arguments(args)
        with self._current():
            function = self._function(source, kernel, signature, shared)
            function.prepared_async_call((grid, 1, 1), (block, 1, 1), self._stream, *values, shared_size=shared)
