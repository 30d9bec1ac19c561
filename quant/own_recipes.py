"""Recipes that came out of measuring what is lost: the method carried over from the weights to their inputs.

Weights of a converged network are close to full rank, its inputs are not: 8 of 256 directions hold most of their energy.
So the low-rank part goes where the low rank is (low_rank_metric "input"), and weights are rounded by gptq. What comes out
of a ReLU is not low-rank: such inputs keep all their directions.

Guarantees: each entry says what it needs beforehand and what it adds at run time.
Knows nothing of: how a recipe is carried out, and how good it is (benchmarks/results says that).
"""

from typing import Any

from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.rival_recipes import AFTER_RELU

SEEN = "second moments of self-sampled inputs"
GPTQ = "Frantar et al., GPTQ, ICLR 2023; scales by the output's error, asymmetric activations"
INPUT = "ours: Bit-DGDM's low-rank part (PMLR 267:19996-20015) taken from the inputs; gptq for the remainder"

_ROUNDED: dict[str, Any] = {
    "rounding": "gptq", "weight_clip": "output", "act_asymmetric": True, "calibration": "uniform",
}  # fmt: skip
_NO_FACTORS = (("rank", 0), ("low_rank_metric", "weight"), ("solver", "scaledgd"))


def _gptq(weight_bits: int, act_bits: int) -> Recipe:
    return Recipe(
        f"gptq-asym-w{weight_bits}a{act_bits}", weight_bits, act_bits, **_ROUNDED,
        summary=f"{weight_bits}-bit weights by gptq on the best scale for the output, asymmetric {act_bits}-bit activations",
        source=GPTQ, cost=f"{SEEN}; nothing beside the low-bit product",
    )  # fmt: skip


def _input(
    rank: int, weight_bits: int = 4, act_bits: int = 4, sigma: float | None = 2.5, **more: Any
) -> Recipe:
    outliers = "" if sigma is None else f", outliers beyond {sigma} sigma in 16 bit"
    method = "bitdgdm-input-hadamard" if more.get("premul") == "hadamard" else "bitdgdm-input"
    turned = "turned by a Hadamard transform, " if more.get("premul") == "hadamard" else ""
    if not turned:  # turned ones mix channels and lose by it
        more |= {"version": 2, "overrides": tuple((pattern, _NO_FACTORS) for pattern in AFTER_RELU)}
    return Recipe(
        f"{method}-w{weight_bits}a{act_bits}-r{rank}", weight_bits, act_bits, rank=rank, solver="svd",
        low_rank_metric="input", factor_bits=8, outlier_sigma=sigma, **_ROUNDED, **more,
        summary=f"inputs {turned}without their {rank} principal directions in {act_bits} bit{outliers}; "
        f"{weight_bits}-bit weights by gptq",
        source=INPUT,
        cost=f"{SEEN}; two thin products of rank {rank} in 16 bit before and after the low-bit one",
    )  # fmt: skip


DEFAULT = Recipe(
    "gptq-fp8-one-w4a8", 4, 8, weight_clip="output", act_format="fp8", act_scale="one", rounding="gptq",
    calibration="uniform",
    summary="4-bit weights by gptq, which e4m3 holds too, activations cast to e4m3 as they are, saturating at 448",
    source="Frantar et al., GPTQ, ICLR 2023; scales by the output's error",
    cost=f"{SEEN}; nothing beside the fp8 product",
)  # fmt: skip
"""What `bitdgdm quantize` takes when no recipe is named: the smallest that our kernels run, and nearer to full precision
than any with 4-bit activations."""

OWN = (
    _input(2),
    _input(4),
    _input(8),
    _input(16),
    _input(8, sigma=None, premul="hadamard"),
    _input(4, 3, 8, sigma=None),
    _gptq(3, 8),
    _gptq(4, 8),
    Recipe(
        "gptq-asym-w4a4", 4, 4, outlier_sigma=2.5, version=2, **_ROUNDED,
        summary="4-bit weights by gptq, asymmetric 4-bit activations, outliers beyond 2.5 sigma in 16 bit",
        source=GPTQ, cost=f"{SEEN}; a sparse product of the outliers beside the 4-bit one",
    ),
    Recipe(
        "gptq-asym-w8a8", 8, 8, outlier_sigma=3.0, version=2, **_ROUNDED,
        summary="8-bit weights by gptq, asymmetric 8-bit activations, outliers beyond 3 sigma in 16 bit",
        source=GPTQ, cost=f"{SEEN}; a sparse product of the outliers beside the 8-bit one",
    ),
    Recipe(
        "gptq-fp8-one-w8a8", 8, 8, weight_format="fp8", act_format="fp8", act_scale="one", rounding="gptq",
        calibration="uniform",
        summary="e4m3 weights by gptq, activations cast to e4m3 as they are, saturating at 448",
        source="Frantar et al., GPTQ, ICLR 2023, on the e4m3 grid", cost=f"{SEEN}; nothing beside the fp8 product",
    ),
    DEFAULT,
)  # fmt: skip
