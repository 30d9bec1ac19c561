"""Run (needs a CUDA device): .venv/bin/python -m pytest tests/models/test_digress_cuda.py -q"""

import pytest
import torch
from torch import Tensor

from bitdgdm.models.digress import build
from bitdgdm.models.features import network_input
from bitdgdm.models.source import load_source

pytestmark = pytest.mark.gpu
SHIPPED = load_source("builtin:digress-qm9")


def molecules(size: int, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """X, E, t / T, mask of random graphs of 1..9 atoms, drawn on the CPU."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.randint(1, 10, (size, 1), generator=g)
    X = torch.eye(4)[torch.randint(4, (size, 9), generator=g)] * mask[..., None]
    kinds = torch.multinomial(torch.tensor([0.72, 0.24, 0.03, 0.01]), size * 81, True, generator=g)
    upper = kinds.reshape(size, 9, 9).triu(1)
    E = torch.eye(5)[upper + upper.transpose(1, 2)] * (mask[:, :, None] & mask[:, None])[..., None]
    return tuple(tensor.to(device) for tensor in (X, E, torch.rand(size, generator=g), mask))


def test_features_are_the_same_on_both_devices() -> None:
    here = network_input(*molecules(2000, "cpu"), SHIPPED.config)
    there = network_input(*molecules(2000, "cuda"), SHIPPED.config)
    for ours, theirs in zip(there, here, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-6, rtol=0)


def test_logits_are_the_same_on_both_devices() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    outputs = []
    for device in ("cpu", "cuda"):
        net = build(SHIPPED.config, SHIPPED.weights).to(device)
        X, E, t, mask = molecules(64, device)
        with torch.inference_mode():
            outputs.append([out.cpu() for out in net(*network_input(X, E, t, mask, SHIPPED.config), mask)])
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_step_can_be_captured_in_a_cuda_graph_and_replayed_on_other_molecules() -> None:
    net = build(SHIPPED.config, SHIPPED.weights).cuda()
    X, E, t, mask = molecules(64, "cuda")
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a warm-up, so that libraries allocate outside the capture
            net(*network_input(X, E, t, mask, SHIPPED.config), mask)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = net(*network_input(X, E, t, mask, SHIPPED.config), mask)
        for tensor, other in zip((X, E, t, mask), molecules(64, "cuda", seed=1), strict=True):
            tensor.copy_(other)
        graph.replay()
        expected = net(*network_input(X, E, t, mask, SHIPPED.config), mask)
    for ours, theirs in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
