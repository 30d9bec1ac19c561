"""The recipe book: every recipe that can be asked for by name.

Guarantees: names are unique and follow `<method>-w<bits>a<bits>[-r<rank>][-s<alpha %>]`; each entry runs, and says in
one line what it does, what it costs and where it is from. The first one is the default.
Knows nothing of: how a recipe is carried out, and how good it is (benchmarks/results says that).
"""

from bitdgdm.infra.errors import UnknownRecipe
from bitdgdm.quant.recipe import Recipe

_RECIPES = (
    Recipe(
        name="bitdgdm-w4a4-r16-s1",
        weight_bits=4,
        act_bits=4,
        rank=16,
        alpha=0.01,
        factor_bits=8,
        act_asymmetric=True,
        outlier_sigma=3.0,
        weight_clip="mse",
        summary="rank 16 + 1 % sparse + 4-bit remainder; 4-bit activations, outliers in 16 bit",
        cost="no calibration; a rank-16 and a sparse product in 16 bit beside the 4-bit one",
        source="Bit-DGDM, PMLR 267:19996-20015; the 4-bit remainder is ours (reading R2)",
    ),
    Recipe(
        name="rtn-w8a8",
        weight_bits=8,
        act_bits=8,
        summary="round to nearest, 8-bit weights per output channel, 8-bit activations per token",
        cost="no calibration; nothing beside the 8-bit product",
        source="absmax rounding",
    ),
    Recipe(
        name="rtn-w4a4",
        weight_bits=4,
        act_bits=4,
        summary="round to nearest, 4-bit weights per output channel, 4-bit activations per token",
        cost="no calibration; nothing beside the 4-bit product",
        source="absmax rounding",
    ),
    Recipe(
        name="w16",
        weight_bits=16,
        act_bits=16,
        summary="weights stored in 16 bit, nothing quantized",
        cost="nothing",
        source="the source model",
    ),
    Recipe(
        name="fp32",
        weight_bits=32,
        act_bits=32,
        summary="weights as they are, nothing quantized",
        cost="nothing",
        source="the source model",
    ),
)


def recipes() -> tuple[Recipe, ...]:
    """Every registered recipe, the default one first."""
    return _RECIPES


def get_recipe(name: str) -> Recipe:
    """Raises: UnknownRecipe, which lists the known names."""
    for recipe in _RECIPES:
        if recipe.name == name:
            return recipe
    raise UnknownRecipe(name, (recipe.name for recipe in _RECIPES))
