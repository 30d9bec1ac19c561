"""Recipes: what is stored and what is computed, as values.

Guarantees: a recipe is frozen, equal fields mean the same recipe, and `to_dict` / `from_dict` round-trip
through JSON. A change of what a recipe computes needs a new `version`, because artifacts store all fields.
Knows nothing of: how a recipe is carried out (decompose.py, linear.py) and which network it is applied to.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bitdgdm.infra.errors import UnknownRecipe

FULL_PRECISION = 16
"""Bit widths from here on mean "not quantized"."""


@dataclass(frozen=True)
class Recipe:
    """One way to store and run a Linear: `y = Q(x_D) D^T + x_S D^T + x (L R^T + S)^T + b`.

    weight_bits: 4 or 8 for integer codes D with one scale per output channel; 16 or 32 for plain floats.
    act_bits: 4 or 8 for integer codes with one scale per token, computed at run time; 16 or 32 for none.
    weight_clip: "absmax" (no weight is clipped) or "mse" (the scale with the least squared error of its row).
    rank, alpha: size of L R^T, and the largest fraction of non-zeros in a row and in a column of S; 0 leaves
    it out.
    factor_bits: 16, or 8 for integer factors with one scale per rank component.
    act_asymmetric: the token's range needn't be centred on zero; zero itself is always represented exactly.
    outlier_sigma: k of the activation outliers x_S that stay in 16 bit (|x| > tau, tau from k); None keeps
    none.
    """

    name: str
    weight_bits: int
    act_bits: int
    rank: int = 0
    alpha: float = 0.0
    factor_bits: int = FULL_PRECISION
    act_asymmetric: bool = False
    outlier_sigma: float | None = None
    weight_clip: str = "absmax"
    summary: str = ""
    source: str = ""
    version: int = 1

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8, 16, 32) or self.act_bits not in (4, 8, 16, 32):
            raise ValueError(
                f"{self.name}: bit widths are 4, 8, 16 or 32, not w{self.weight_bits}a{self.act_bits}"
            )
        if self.factor_bits not in (8, 16):
            raise ValueError(f"{self.name}: factor_bits is 8 or 16, not {self.factor_bits}")
        if self.weight_clip not in ("absmax", "mse"):
            raise ValueError(f'{self.name}: weight_clip is "absmax" or "mse", not {self.weight_clip!r}')
        if self.rank < 0 or not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"{self.name}: rank {self.rank} or alpha {self.alpha} is out of range")
        if self.outlier_sigma is not None and not self.outlier_sigma > 0.0:
            raise ValueError(
                f"{self.name}: outlier_sigma is a positive number or None, not {self.outlier_sigma}"
            )
        if self.weight_bits >= FULL_PRECISION and (self.rank or self.alpha or self.act_bits < FULL_PRECISION):
            raise ValueError(
                f"{self.name}: full-precision weights take no factors, no sparse part, no low-bit input"
            )

    @property
    def weight_quantized(self) -> bool:
        return self.weight_bits < FULL_PRECISION

    @property
    def act_quantized(self) -> bool:
        return self.act_bits < FULL_PRECISION

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Raises: ValueError for unknown or missing keys and for values out of range."""
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ValueError(f"a recipe has the keys {sorted(known)}, not {sorted(values)}")
        return cls(**values)


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
        source="Bit-DGDM, PMLR 267:19996-20015; the 4-bit remainder is ours (reading R2)",
    ),
    Recipe(
        name="rtn-w8a8",
        weight_bits=8,
        act_bits=8,
        summary="round to nearest, 8-bit weights per output channel, 8-bit activations per token",
        source="absmax rounding",
    ),
    Recipe(
        name="rtn-w4a4",
        weight_bits=4,
        act_bits=4,
        summary="round to nearest, 4-bit weights per output channel, 4-bit activations per token",
        source="absmax rounding",
    ),
    Recipe(
        name="w16",
        weight_bits=16,
        act_bits=16,
        summary="weights stored in 16 bit, nothing quantized",
        source="the source model",
    ),
    Recipe(
        name="fp32",
        weight_bits=32,
        act_bits=32,
        summary="weights as they are, nothing quantized",
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
