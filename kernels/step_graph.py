"""All steps of a batch: one denoising step captured as a CUDA graph, replayed with no host work between.

Guarantees: the same bytes as uncaptured launches; on a Launcher without streams (tests) the steps are launched one by one.
Knows nothing of: what a step does; where its first classes come from.
"""

import torch

from bitdgdm.kernels.denoise import Denoiser, attend_steps
from bitdgdm.kernels.launch import Device
from bitdgdm.kernels.network import Shape


def open_device(shape: Shape, index: int = 0) -> Device:
    """The GPU with sources compiled for a network's shape and for the shared memory there. Raises: see Device."""
    device = Device(index)
    device.defines = {**shape.defines, "edge_attend": {"STEPS": attend_steps(device.shared_bytes)}}
    return device


def warm_up(batch: Denoiser) -> None:
    """Run a step and forget it: compiles and loads every kernel, which a capture must not do."""
    kept = [t.clone() for t in (batch.x, batch.e, batch.step, batch.not_finite)]
    batch.forward()
    batch.draw()
    for tensor, before in zip((batch.x, batch.e, batch.step, batch.not_finite), kept, strict=True):
        tensor.copy_(before)


def denoise(batch: Denoiser, steps: int, *, capture: bool = True) -> None:
    """Run `steps` steps from the state that the batch is in; its x and e are the result. Doesn't wait for the device."""
    device = batch.launcher
    if not isinstance(device, Device):
        for _ in range(steps):
            batch.forward()
            batch.draw()
        return
    with device.stream() as stream:
        if not capture:
            for _ in range(steps):
                batch.forward()
                batch.draw()
            return
        warm_up(batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            batch.forward()
            batch.draw()
        for _ in range(steps):
            graph.replay()
        batch.graph = graph  # alive until the last replay is over
