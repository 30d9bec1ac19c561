"""Run: python -m pytest tests/gpu/test_quantize.py -q   (needs a GPU)"""

import pytest
import torch

from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.recipe_book import get_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["rtn-w4a4", "rtn-w8a8", "fp8-w8a8"])
def test_rounding_on_a_gpu_gives_the_bytes_of_the_cpu(name: str) -> None:
    """The largest of a row of 16-bit weights is an exact multiple of 7 often enough for a reciprocal to show."""
    weight = torch.randn(896, 64, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16).float()
    here, there = (decompose(weight.to(where), get_recipe(name))[0].tensors() for where in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    for key, tensor in here.items():
        assert torch.equal(tensor.view(torch.uint8), there[key].cpu().view(torch.uint8)), key
