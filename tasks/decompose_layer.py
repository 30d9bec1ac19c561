"""Decompose one Linear: the unit of work of `bitdgdm quantize`.

Guarantees: the result depends on (weight, recipe) only; a retry returns the same bytes.
Knows nothing of: which model the weight is from, where the result is stored.
"""

import ray
import torch
from torch import Tensor

from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.parts import LinearParts
from bitdgdm.quant.recipe import Recipe


def decompose_layer(weight: Tensor, recipe: Recipe) -> tuple[LinearParts, LayerReport]:
    """Return the parts of `weight`: float32[out, in], on the CPU, computed on a GPU when this task was given one.

    Raises: NotFinite.
    """
    device = "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"
    return decompose(weight.to(device), recipe)


@ray.remote(max_retries=3)
def decompose_task(weight: Tensor, recipe: Recipe) -> tuple[LinearParts, LayerReport]:
    """`decompose_layer` as a Ray task; a lost worker is retried, an application error is not."""
    torch.set_num_threads(1)  # a task owns one core; the sum of threads must not exceed the machine
    return decompose_layer(weight, recipe)
