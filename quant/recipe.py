"""A recipe: what is stored and what is computed, as a value.

Guarantees: a recipe is frozen, hashable, equal fields mean the same recipe, and `to_dict` / `from_dict` round-trip
through JSON; a combination that no layer could run is refused when it is made. Keys that an older file lacks take
their defaults, which mean what that file meant. A change of what a recipe computes needs a new `version`.
Knows nothing of: which recipes exist (recipe_book.py), how one is carried out (decompose.py, linear.py) and
which network it is applied to.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

FULL_PRECISION = 16
"""Bit widths from here on mean "not quantized"."""

Changes = tuple[tuple[str, Any], ...]
"""Fields of a recipe that are different in some layers."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "weight_bits": (1, 3, 4, 6, 8, 16, 32),
    "act_bits": (4, 6, 8, 16, 32),
    "factor_bits": (4, 8, 16),
    "weight_clip": ("absmax", "mse", "output"),
    "weight_format": ("int", "fp8", "codebook", "binary"),
    "rounding": ("nearest", "gptq", "adaround"),
    "solver": ("scaledgd", "altproj", "lrpca", "lrpca-trained", "pcp", "outlier-pursuit", "svd"),
    "low_rank_metric": ("weight", "output", "input"),
    "sparse_choice": ("residual", "magnitude", "sensitivity", "salient"),
    "column_choice": ("activation", "weight"),
    "premul": ("none", "smooth", "hadamard", "duquant"),
    "act_format": ("int", "fp8", "log"),
    "act_scale": ("token", "group", "static", "one"),
    "act_range": ("absmax", "mse", "quantile"),
    "act_groups": ("equal", "learned", "smooth"),
    "calibration": ("none", "uniform", "skewed"),
}
COUNTS = ("rank", "weight_group", "columns", "outlier_budget", "act_bins", "repair_steps", "repair_rank")
LARGEST_COUNT = 2**16
"""No width comes near it: a slip in a file must not ask for more memory than there is."""
FLAGS = ("act_asymmetric", "remainder", "cross_product")


@dataclass(frozen=True)
class Recipe:
    """One way to store and run a Linear, x' = T x and W' = W T^-1 being its input and weight after `premul`:

        y = Q(x_D) D^T + x_S D^T + x' (L R^T + S)^T + x_C C^T + b,      W' ~ D + L R^T + S + C

    weight_bits: of the codes D; 16 or 32 for plain floats. act_bits: of the activation codes; 16 or 32 for none.
    rank, alpha: size of L R^T, and the largest fraction of non-zeros in a row and in a column of S; 0 leaves it out.
    factor_bits: 16, or 8 or 4 for integer factors with one scale per rank component.
    act_asymmetric: a token's range needn't be centred on zero; zero itself is always represented exactly.
    outlier_sigma: k of the activation outliers x_S that stay in 16 bit (|x'| > tau, tau from k); None keeps none.
    weight_clip: "absmax" (no weight is clipped), "mse" (the scale with the least squared error of its row) or "output"
    (the scale with which gptq loses least of its row's output).
    weight_format: "int"; "fp8" (e4m3, a scale per row); "codebook" (2^bits values per row); "binary" (+-scale per row).
    weight_group: inputs that share a scale; 0 for the whole row.
    rounding: how D is rounded: to "nearest", or with the output's error in view ("gptq", "adaround").
    remainder: False leaves D out: Q(x_D) Q(R) Q(L)^T + x_S R L^T + x' S^T, the literal reading of the published method.
    solver: finds L R^T and S. low_rank_metric: "weight" makes ||W' - L R^T|| small, "output" the error of the output.
    "input" takes the principal directions R of the inputs out of what is rounded: with z = R^T x' and x'' = x' - R z,
    y = Q(x''_D) D^T + x''_S D^T + z L^T + b, D ~ W', L = W' R.
    sparse_choice: S holds the largest of what L R^T leaves ("residual") or, chosen before it, of W' ("magnitude"),
    of W' weighted by its inputs' size ("sensitivity"), or W's salient entries ("salient").
    columns: whole input channels C kept in 16 bit with their activations, by `column_choice`.
    premul, smooth_strength: the transform T of the input.
    act_format: "int", "fp8", or "log" (powers of 2^(1/4), for inputs that are never negative).
    act_scale: at run time one per "token", or one per token and "group" of inputs, those of the weight; a "static" table
    per time bin; or "one" (fp8).
    act_bins, act_range, act_groups: of the static table: how many time bins, how a bin's range is chosen, and whether
    bins are of "equal" length, "learned" by clustering, or every time has its own entry of a "smooth" function.
    calibration: how diffusion times of the calibration pass are drawn; "none" if nothing here needs one.
    outlier_budget: exactly this many entries of a token, the largest, are x_S. cross_product: False drops x_S S^T.
    repair_steps, repair_rank: distillation of the assembled network; it learns biases, and factors that join L and R.
    overrides: (pattern of layer names, changed fields) pairs; the first pattern that matches counts.
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
    cost: str = ""
    weight_format: str = "int"
    weight_group: int = 0
    rounding: str = "nearest"
    remainder: bool = True
    solver: str = "scaledgd"
    low_rank_metric: str = "weight"
    sparse_choice: str = "residual"
    columns: int = 0
    column_choice: str = "activation"
    premul: str = "none"
    smooth_strength: float = 0.5
    act_format: str = "int"
    act_scale: str = "token"
    act_bins: int = 1
    act_range: str = "absmax"
    act_groups: str = "equal"
    calibration: str = "none"
    outlier_budget: int = 0
    cross_product: bool = True
    repair_steps: int = 0
    repair_rank: int = 0
    overrides: tuple[tuple[str, Changes], ...] = ()

    def __post_init__(self) -> None:
        for field in ("name", "summary", "source", "cost"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field} is text, not {getattr(self, field)!r}")
        if "/" in self.name or not self.name.isprintable():
            raise ValueError(f"a name is a line of text without slashes, not {self.name!r}")
        for field in ("alpha", "smooth_strength", "outlier_sigma"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) and not (value is None and field == "outlier_sigma"):
                raise ValueError(f"{self.name}: {field} is a number, not {value!r}")
        for field, allowed in CHOICES.items():
            if (type(getattr(self, field)), getattr(self, field)) not in [(type(a), a) for a in allowed]:
                raise ValueError(f"{self.name}: {field} is one of {allowed}, not {getattr(self, field)!r}")
        for field in COUNTS:
            if type(getattr(self, field)) is not int or not 0 <= getattr(self, field) <= LARGEST_COUNT:
                raise ValueError(f"{self.name}: {field} is a count, not {getattr(self, field)!r}")
        for field in FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{self.name}: {field} is true or false, not {getattr(self, field)!r}")
        for rule, broken in self._rules():
            if broken:
                raise ValueError(f"{self.name}: {rule}")
        for pattern, changes in self.overrides:
            self._changed(pattern, changes)

    def _rules(self) -> tuple[tuple[str, bool], ...]:
        """What must hold between fields, each with whether it is broken."""
        sigma, act, static = self.outlier_sigma, self.act_quantized, self.act_scale == "static"
        one_scale_a_row = self.weight_format == "int" and not self.weight_group
        parts = self.rank or self.alpha or self.columns or self.premul != "none" or act
        return (
            (f"alpha {self.alpha} is out of range", not 0.0 <= self.alpha < 1.0),
            (f"smooth_strength {self.smooth_strength} is not in [0, 1]", not 0.0 <= self.smooth_strength <= 1.0),
            (f"outlier_sigma is a positive number or None, not {sigma}", sigma is not None and not sigma > 0.0),
            ("full-precision weights take no factors, sparse part, columns, transform or low-bit input",
             not self.weight_quantized and bool(parts)),
            ("1-bit weights are binary and binary weights have 1 bit",
             (self.weight_bits == 1) != (self.weight_format == "binary")),
            ("fp8 weights have 8 bits", self.weight_format == "fp8" and self.weight_bits != 8),
            ("codebook weights have 3 or 4 bits and 16-bit inputs",
             self.weight_format == "codebook" and (self.weight_bits not in (3, 4) or act)),
            ("gptq rounds integers and fp8, adaround integers",
             self.weight_format not in {"nearest": (self.weight_format,), "gptq": ("int", "fp8"), "adaround": ("int",)}[self.rounding]),
            ("a clip by the output needs integers rounded by gptq",
             self.weight_clip == "output" and (self.rounding, self.weight_format) != ("gptq", "int")),
            ("adaround knows one scale a row", self.rounding == "adaround" and not one_scale_a_row),
            ("a group of weights has integer codes", bool(self.weight_group) and self.weight_format != "int"),
            ("without a remainder there must be a rank", not self.remainder and not self.rank),
            ("without a remainder there is nothing to group, to round or to keep in columns",
             not self.remainder and not (one_scale_a_row and self.rounding == "nearest" and not self.columns)),
            ("the metrics output and input need a rank and the solver svd",
             self.low_rank_metric != "weight" and not (self.rank and self.solver == "svd")),
            ("the metric input takes a remainder and no sparse part or columns",
             self.low_rank_metric == "input" and not (self.remainder and not self.alpha and not self.columns)),
            ("a choice of sparse entries needs an alpha", self.sparse_choice != "residual" and not self.alpha),
            ("outlier-pursuit chooses whole columns: it takes a rank, an alpha and no columns or choice of its own",
             self.solver == "outlier-pursuit"
             and (not (self.rank and self.alpha and self.remainder) or bool(self.columns)
                  or self.sparse_choice != "residual")),
            ("fp8 inputs have 8 bits and no zero point",
             self.act_format == "fp8" and (self.act_bits != 8 or self.act_asymmetric)),
            ("log inputs have one scale a token, no zero point and no transform that could make them negative",
             self.act_format == "log"
             and (self.act_scale != "token" or self.act_asymmetric or self.low_rank_metric == "input"
                  or self.premul not in ("none", "smooth"))),
            ("a static range of fp8 inputs is absmax",
             self.act_format == "fp8" and (self.act_range, self.act_groups) != ("absmax", "equal")),
            ("learned groups are at least two, a smooth table has an entry for every time and no bins",
             {"equal": False, "learned": self.act_bins < 2, "smooth": self.act_bins != 1}[self.act_groups]),
            ("act_scale one needs fp8 inputs", self.act_scale == "one" and self.act_format != "fp8"),
            ("a scale a group of inputs needs groups of weights and integer inputs",
             self.act_scale == "group" and not (self.weight_group and self.act_format == "int")),
            ("a scale of the inputs needs low-bit inputs", self.act_scale != "token" and not act),
            (f"act_bins is at least 1, not {self.act_bins}", self.act_bins < 1),
            ("time bins, ranges and groups belong to a static scale",
             not static and (self.act_bins, self.act_range, self.act_groups) != (1, "absmax", "equal")),
            ("outlier_budget and outlier_sigma exclude each other", bool(self.outlier_budget) and sigma is not None),
            ("a budget of outliers needs low-bit inputs", bool(self.outlier_budget) and not act),
            ("factors of a repair take steps", bool(self.repair_rank) and not self.repair_steps),
            ("factors of a repair meet all of the input, those of a recipe without a remainder don't",
             bool(self.repair_rank) and not self.remainder),
            (f'calibration is "none" only where nothing needs it, here {self.calibration!r}',
             self.needs_calibration != (self.calibration != "none")),
        )  # fmt: skip

    @property
    def weight_quantized(self) -> bool:
        return self.weight_bits < FULL_PRECISION

    @property
    def act_quantized(self) -> bool:
        return self.act_bits < FULL_PRECISION

    @property
    def codes_are_fp8(self) -> bool:
        """Whether e4m3 holds every code of the weights: it holds all integers of 4 bit."""
        few_bits = self.weight_format == "int" and self.weight_bits <= 4
        return few_bits or self.weight_format == "fp8"

    @property
    def needs_calibration(self) -> bool:
        """Whether a layer's inputs must be seen before it is decomposed, or the network be run after that."""
        return _needs_calibration(vars(self)) or any(
            _needs_calibration(vars(self._changed(pattern, changes))) for pattern, changes in self.overrides
        )

    def for_layer(self, layer: str) -> "Recipe":
        """The recipe of one layer, without overrides; `calibration` is "none" where that layer needs none."""
        for pattern, changes in self.overrides:
            if fnmatchcase(layer, pattern):
                return self._changed(pattern, changes)
        return self._changed("", ()) if self.overrides else self

    def changed(self, **changes: Any) -> "Recipe":
        """One layer's recipe with other fields; `calibration` follows from what it then needs.

        Raises: ValueError for fields that there aren't and for what no layer could run.
        """
        if _needs_calibration(vars(self) | changes) and self.calibration == "none":
            changes = {"calibration": "uniform"} | changes
        return self._changed("a change", tuple(changes.items()))

    def _changed(self, pattern: str, changes: Changes) -> "Recipe":
        values = {f.name: getattr(self, f.name) for f in fields(self)} | dict(changes) | {"overrides": ()}
        unknown = set(values) - {f.name for f in fields(self)}
        if unknown:
            raise ValueError(f"{self.name}: {pattern} changes fields that there aren't: {sorted(unknown)}")
        if values["weight_bits"] >= FULL_PRECISION:  # such a layer keeps nothing of the recipe but its name
            kept = ("name", "weight_bits", "summary", "source", "version", "cost")
            return Recipe(**{key: values[key] for key in kept}, act_bits=values["weight_bits"])
        if not _needs_calibration(values):
            values["calibration"] = "none"
        return Recipe(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        overrides = [
            [pattern, [[key, value] for key, value in changes]] for pattern, changes in self.overrides
        ]
        return asdict(self) | {"overrides": overrides}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Raises: ValueError or TypeError for unknown keys, values out of range, and keys without default missing."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(
                f"a recipe has no {sorted(unknown)}; its keys are {sorted(f.name for f in fields(cls))}"
            )
        if missing := {"name", "weight_bits", "act_bits"} - set(values):
            raise ValueError(f"a recipe needs {sorted(missing)}")
        if not values["name"]:
            raise ValueError("a recipe that is kept has a name")
        pairs = values.get("overrides", ())
        overrides = tuple(
            (str(p), tuple((str(key), value) for key, value in changes)) for p, changes in pairs
        )
        return cls(**{**values, "overrides": overrides})


def _needs_calibration(values: Mapping[str, Any]) -> bool:
    """Whether one layer with these fields does, whatever its overrides."""
    return bool(
        values["rounding"] != "nearest"
        or values["low_rank_metric"] != "weight"
        or values["sparse_choice"] in ("sensitivity", "salient")
        or values["premul"] in ("smooth", "duquant")
        or values["act_scale"] == "static"
        or (values["columns"] and values["column_choice"] == "activation")
        or values["repair_steps"]
    )
