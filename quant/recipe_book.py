"""The recipe book: every recipe that can be asked for by name; here the method in its readings, with its ablations.

Guarantees: names are unique and follow `<method>-w<bits>a<bits>[-r<rank>][-s<alpha %>][-<variant>]`; each entry runs, and
says in one line what it does, what it costs and where it is from. The first one is the default, which is not the published
method: the reading that we take for that is `bitdgdm-w4a4-r16-s1` (R2).
Knows nothing of: how a recipe is carried out, and how good it is (benchmarks/results says that).
"""

import json
from pathlib import Path

from bitdgdm.infra.errors import BadInput, UnknownRecipe
from bitdgdm.quant.own_recipes import DEFAULT, OWN
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.rival_recipes import RIVALS

PAPER = "Bit-DGDM, PMLR 267:19996-20015"
NO_DATA = "no calibration"

R2 = Recipe(
    "bitdgdm-w4a4-r16-s1", 4, 4, rank=16, alpha=0.01, factor_bits=8, act_asymmetric=True, outlier_sigma=3.0,
    weight_clip="mse", version=2,
    summary="rank 16 + 1 % sparse + 4-bit remainder; 4-bit activations, outliers in 16 bit",
    source=f"{PAPER}; the 4-bit remainder is ours (reading R2)",
    cost=f"{NO_DATA}; a rank-16 and a sparse product in 16 bit beside the 4-bit one",
)  # fmt: skip

_IN_16_BIT = {"factor_bits": 16, "source": f"{PAPER}; factors in 16 bit as there"}


def _solved_by(solver: str, method: str, source: str, steps: str) -> Recipe:
    """R2 with another solver of its low-rank and sparse part."""
    return R2.changed(
        name=f"bitdgdm-{method}-w4a4-r16-s1",
        solver=solver,
        summary=f"{R2.name}, its low-rank and sparse part found by {steps}",
        source=source,
        cost=f"{NO_DATA}; at run time as {R2.name}",
    )


METHOD = (
    R2,
    R2.changed(
        name="bitdgdm-w4a4-r8-s1",
        rank=8,
        summary=f"{R2.name} with rank 8",
        cost=f"{NO_DATA}; a rank-8 and a sparse product in 16 bit beside the 4-bit one",
    ),
    R2.changed(
        name="bitdgdm-w4a4-r32-s1",
        rank=32,
        summary=f"{R2.name} with rank 32",
        cost=f"{NO_DATA}; a rank-32 and a sparse product in 16 bit beside the 4-bit one",
    ),
    R2.changed(name="bitdgdm-w4a4-r8-s1-f16", rank=8, summary="rank study: rank 8", **_IN_16_BIT),
    R2.changed(name="bitdgdm-w4a4-r16-s1-f16", summary="rank study: rank 16", **_IN_16_BIT),
    R2.changed(name="bitdgdm-w4a4-r32-s1-f16", rank=32, summary="rank study: rank 32", **_IN_16_BIT),
    R2.changed(
        name="bitdgdm-w4a4-r16-s5-f16",
        alpha=0.05,
        summary="rank 16 + 5 % sparse + 4-bit remainder",
        **_IN_16_BIT,
    ),
    R2.changed(
        name="bitdgdm-r1-w4a4-r16-s5",
        alpha=0.05,
        factor_bits=4,
        remainder=False,
        summary="the literal reading R1: 4-bit factors of rank 16 + 5 % sparse, and nothing else",
        source=f"{PAPER}, section 4 read word by word; the inner rank-16 vector isn't rounded again",
        cost=f"{NO_DATA}; two thin products and a sparse one, no full product at all",
    ),
    R2.changed(
        name="bitdgdm-r1-w4a4-r16-s5-f16",
        alpha=0.05,
        factor_bits=16,
        remainder=False,
        summary="R1 with factors in 16 bit: what is lost is the weights' rank",
        source=f"{PAPER}, section 4 read word by word",
        cost=f"{NO_DATA}; two thin products and a sparse one, no full product at all",
    ),
    R2.changed(
        name="bitdgdm-r3-w4a4-s1",
        rank=0,
        summary="reading R3 and ablation (ii): the largest 1 % of the weights sparse, the rest in 4 bit",
        source=f"{PAPER}, ablation with thresholded weight outliers",
        cost=f"{NO_DATA}; a sparse product in 16 bit beside the 4-bit one",
    ),
    R2.changed(
        name="bitdgdm-threshold-w4a4-r16-s1",
        sparse_choice="magnitude",
        solver="svd",
        summary="the largest 1 % of the weights sparse first, then rank 16 of the rest",
        source=f"{PAPER}, its threshold in front of our low-rank part",
        cost=f"{NO_DATA}; at run time as {R2.name}",
    ),
    R2.changed(
        name="bitdgdm-minus-w4a4-r16-s1",
        cross_product=False,
        summary="ablation (iii): without the product of sparse inputs and sparse weights",
        source=f"{PAPER}, Bit-DGDM-; which product it leaves out is not published, this is our reading",
        cost=f"{NO_DATA}; {R2.name} less its smallest product",
    ),
    R2.changed(
        name="bitdgdm-nosparse-w4a4-r16",
        alpha=0.0,
        outlier_sigma=None,
        solver="svd",
        summary="ablation (iii) taken to its end: no sparse weights and no sparse inputs",
        source=f"{PAPER}, ablation without sparse products",
        cost=f"{NO_DATA}; a rank-16 product in 16 bit beside the 4-bit one",
    ),
    R2.changed(
        name="bitdgdm-repair-w4a4-r16-s1",
        repair_steps=100,
        summary=f"{R2.name}, its biases distilled on the network's own molecules",
        source=f"{PAPER}; Nagel et al., ICCV 2019, for biases that take back what rounding shifts",
        cost=f"self-drawn molecules and 100 steps of training; at run time and in size as {R2.name}",
    ),
    _solved_by("svd", "svd", "truncated SVD", "a truncated SVD, then the largest of what it leaves"),
    _solved_by("altproj", "altproj", "Netrapalli et al., NeurIPS 2014", "alternating projections"),
    _solved_by(
        "lrpca", "lrpca", "Cai, Liu, Yin, NeurIPS 2021", "Learned RPCA with a schedule that needs no data"
    ),
    _solved_by(
        "lrpca-trained",
        "lrpca-trained",
        "Cai, Liu, Yin, NeurIPS 2021",
        "Learned RPCA with a trained schedule",
    ),
    _solved_by(
        "pcp", "pcp", "Candes et al., J. ACM 58(3), 2011", "principal component pursuit (convex, ADMM)"
    ),
    R2.changed(
        name="bitdgdm-pursuit-w4a4-r16-s1",
        solver="outlier-pursuit",
        summary="rank 16 + whole outlying columns (1 % of the inputs, their activations too) + 4-bit remainder",
        source="Xu, Caramanis, Sanghavi, IEEE Trans. Inf. Theory 58(5), 2012",
        cost=f"{NO_DATA}; a dense product of a few inputs in the place of the sparse one",
    ),
)

PLAIN = (
    Recipe(
        "w16",
        16,
        16,
        summary="weights stored in 16 bit, nothing quantized",
        source="the source model",
        cost="nothing",
    ),
    Recipe(
        "fp32",
        32,
        32,
        summary="weights as they are, nothing quantized",
        source="the source model",
        cost="nothing",
    ),
)

_RECIPES = (DEFAULT, *METHOD, *(r for r in OWN if r is not DEFAULT), *RIVALS, *PLAIN)


def recipes() -> tuple[Recipe, ...]:
    """Every registered recipe, the default one first."""
    return _RECIPES


def get_recipe(name: str) -> Recipe:
    """Raises: UnknownRecipe, which lists the known names."""
    for recipe in _RECIPES:
        if recipe.name == name:
            return recipe
    raise UnknownRecipe(name, (recipe.name for recipe in _RECIPES))


def open_recipe(name: str) -> Recipe:
    """A registered recipe by its name, or that of a JSON file (`Recipe.to_dict`), as `bitdgdm search` writes it.

    Raises: UnknownRecipe; BadInput for a file that isn't there or holds no recipe.
    """
    if not name.endswith(".json"):
        return get_recipe(name)
    path = Path(name)
    if not path.is_file():
        raise BadInput(
            f"there is no recipe file {name}. Write one with: bitdgdm search MODEL --bits 4.3 --out {name}"
        )
    try:
        return Recipe.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{name} holds no recipe ({error}). Write one with: bitdgdm search MODEL --bits 4.3 --out {name}"
        ) from error
