"""Decompose a group of Linears of one shape: the unit of work of `bitdgdm quantize`.

Guarantees: the result depends on (weights of the group, recipe, statistics) only; a retry returns the same bytes.
Knows nothing of: which model the weights are from, where the result is stored.
"""

from collections.abc import Sequence

import ray
import torch
from torch import Tensor

from bitdgdm.quant.decompose import decompose_group
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.parts import LinearParts
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.stats import LayerStats


def decompose_layers(
    weights: Sequence[Tensor], recipe: Recipe, stats: Sequence[LayerStats] | None = None
) -> list[tuple[LinearParts, LayerReport]]:
    """Return the parts of each weight, float[out, in] of one shape, on the CPU.

    Computed on the GPU that a Ray task was given, in a process of its own on any GPU there is, else on the CPU.
    Raises: NotFinite.
    """
    on_gpu = bool(ray.get_gpu_ids()) if ray.is_initialized() else torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    return decompose_group([weight.to(device) for weight in weights], recipe, stats)


@ray.remote(max_retries=3)
def decompose_task(
    weights: Sequence[Tensor], recipe: Recipe, stats: Sequence[LayerStats] | None
) -> list[tuple[LinearParts, LayerReport]]:
    """`decompose_layers` as a Ray task; a lost worker is retried, an application error is not."""
    torch.set_num_threads(1)  # a task owns one core; the sum of threads must not exceed the machine
    return decompose_layers(weights, recipe, stats)
