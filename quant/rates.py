"""How long a Linear takes on a chip, in units that only ratios are meant of.

Guarantees: a function of (recipe, shape, rows, chip); the dense product runs on the unit that its codes fit, thin
products and columns in bf16.
Knows nothing of: memory traffic, launches, which kernels exist; the sparse parts, whose cost depends on the kernel.

Rates are multiples of the chip's own bf16 (fp16 with float32 sums on Ada) tensor-core rate. h200: mma.sync measured here,
bf16 636, int8 1272, e4m3 1519 T/s, int4 emulated at 69, so 4-bit codes are unpacked to int8. a100: NVIDIA data sheet, 312,
624 int8, 1248 int4, no fp8. rtx4090: NVIDIA Ada white paper, 165, 660 int8, 1321 int4, 330 fp8 with float32 sums.
"""

from bitdgdm.quant.recipe import Recipe

RATES: dict[str, dict[str, float]] = {
    "h200": {"bf16": 1.0, "int8": 2.0, "fp8": 1519 / 636, "int4": 2.0},
    "a100": {"bf16": 1.0, "int8": 2.0, "fp8": 1.0, "int4": 4.0},
    "rtx4090": {"bf16": 1.0, "int8": 4.0, "fp8": 2.0, "int4": 8.0},
}


def grid(recipe: Recipe) -> str:
    """The unit that runs the dense product of a layer's recipe: "int4", "int8", "fp8" or "bf16"."""
    if not (recipe.weight_quantized and recipe.act_quantized):
        return "bf16"
    if recipe.act_format == "fp8" and recipe.codes_are_fp8:
        return "fp8"
    if recipe.act_format != "int" or recipe.weight_format not in ("int", "binary"):
        return "bf16"
    return "int4" if max(recipe.weight_bits, recipe.act_bits) <= 4 else "int8"


def time_of(recipe: Recipe, shape: tuple[int, int], rows: float, chip: str) -> float:
    """Multiplications per bf16 rate for `rows` tokens through a weight of shape [out, in].

    Raises: KeyError for a chip that isn't in RATES.
    """
    out, width = shape
    main = width * out if recipe.remainder else recipe.rank * (width + out)
    thin = recipe.rank * (width + out) if recipe.remainder else 0
    return rows * (main / RATES[chip][grid(recipe)] + thin + recipe.columns * out)
