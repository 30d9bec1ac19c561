"""All steps of a batch: one denoising step captured as a CUDA graph, replayed with no host work between.

Guarantees: the same bytes as uncaptured launches; on a Launcher without streams (tests) the steps are launched one by one;
nothing here waits for the device but to keep the queue short, so that the next batch is made while one runs.
Knows nothing of: what a step does; where its first classes come from.
"""

import weakref
from collections.abc import Callable

import torch

from bitdgdm.kernels.denoise import Denoiser
from bitdgdm.kernels.fits import defines
from bitdgdm.kernels.launch import Device
from bitdgdm.kernels.network import Shape

AHEAD = 25  # steps between two looks at the device, which always has as many queued


def open_device(shape: Shape, index: int = 0) -> Device:
    """The GPU with sources compiled for a network's shape and for the shared memory there. Raises: see Device."""
    device = Device(index)
    device.defines = defines(shape, device.shared_bytes)
    return device


def step(batch: Denoiser) -> None:
    """Queue one step of the batch."""
    batch.forward()
    batch.draw()


def warm_up(batch: Denoiser) -> None:
    """Run a step and forget it: compiles and loads every kernel of a network, which a capture must not do."""
    kept = [t.clone() for t in (batch.x, batch.e, batch.step, batch.not_finite)]
    step(batch)
    for tensor, before in zip((batch.x, batch.e, batch.step, batch.not_finite), kept, strict=True):
        tensor.copy_(before)


def denoise(
    batch: Denoiser,
    steps: int,
    *,
    capture: bool = True,
    join: bool = True,
    on_step: Callable[[int], object] | None = None,
) -> None:
    """Run `steps` steps from the state that the batch is in; its x and e are the result. Doesn't wait for the end.

    join: see Device.stream. on_step is told how many steps are queued; at most 2 * AHEAD of them still wait for the device.
    """
    device = batch.launcher
    if not isinstance(device, Device):
        _repeat(lambda: step(batch), steps, on_step, None)
        return
    with device.stream(join=join) as stream:
        if not capture:
            _repeat(lambda: step(batch), steps, on_step, stream)
            return
        if not any(seen() is batch.network for seen in device.warm_for):
            warm_up(batch)
            device.warm_for.append(weakref.ref(batch.network))
        graph = torch.cuda.CUDAGraph()  # by hand: torch.cuda.graph waits for the device and empties the allocator's cache
        with device.capturing:
            graph.capture_begin(capture_error_mode="thread_local")
            step(batch)
            graph.capture_end()
        _repeat(graph.replay, steps, on_step, stream)
        batch.graph = graph  # alive until the last replay is over


def _repeat(
    one: Callable[[], object],
    steps: int,
    on_step: Callable[[int], object] | None,
    stream: torch.cuda.Stream | None,
) -> None:
    passed: torch.cuda.Event | None = None
    for k in range(1, steps + 1):
        one()
        if on_step is not None:
            on_step(k)
        if stream is not None and k % AHEAD == 0:  # a bounded queue: progress is true, a signal is heard
            if passed is not None:
                passed.synchronize()
            passed = torch.cuda.Event(blocking=True)
            passed.record(stream)
