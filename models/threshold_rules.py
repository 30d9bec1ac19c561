"""Which rule gives the outlier thresholds of each Linear's input, and the thresholds by that rule.

Guarantees: a rule that is called a bound or a limit holds for every token of a network, because the graph of the
network says what feeds the Linear; where it says nothing, thresholds come from self-drawn molecules and are
estimates.
Knows nothing of: what is done with the entries beyond a threshold.

    layernorm   the input is a LayerNorm's output: |x_j| <= |beta_j| + |gamma_j| sqrt(d - 1) for every token, and at
                most `outlier_limit(d, k)` entries of a token exceed tau_j = |beta_j| + k |gamma_j|
    relu        the input is ReLU(W x + b) of such an output: `relu_bound` holds for every token, no tau does
    sampled     e_out (cubic in the layer's input), x_out, the pooled x_y and e_y, y_out, and layer 0's attention,
                which reads the input MLPs: no closed form
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from bitdgdm.models.digress import quantizable, thresholds
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.source import SourceModel
from bitdgdm.quant.stats import LayerStats
from bitdgdm.quant.thresholds import layernorm_bound, outlier_limit, relu_bound

Rule = Literal["layernorm", "relu", "sampled"]

_FEED_FORWARD = {"linX": "normX1", "linE": "normE1", "lin_y": "norm_y1"}
_ATTENTION = {
    **dict.fromkeys(("q", "k", "v"), "normX2"),
    **dict.fromkeys(("e_add", "e_mul"), "normE2"),
    **dict.fromkeys(("y_e_mul", "y_e_add", "y_x_mul", "y_x_add", "y_y"), "norm_y2"),
}


def rule_of(name: str) -> Rule:
    """The rule of one layer Linear. Raises: ValueError if the name is none."""
    norm = _norm_of(name)
    if norm is None:
        return "sampled"
    return "relu" if name.endswith("2") else "layernorm"


def rules(config: DigressConfig) -> dict[str, Rule]:
    """The rule of each quantizable Linear, by name."""
    return {name: rule_of(name) for name in quantizable(config)}


def limit_of(name: str, width: int, k: float) -> int | None:
    """Largest number of entries beyond k sigma in any token of a Linear's input; None if there is no such limit."""
    return outlier_limit(width, k) if rule_of(name) == "layernorm" else None


def bounds(source: SourceModel) -> dict[str, Tensor]:
    """float32[in] by name of each Linear that has one: no entry of any token exceeds it (up to rounding)."""
    found: dict[str, Tensor] = {}
    for name in quantizable(source.config):
        norm = _norm_of(name)
        if norm is None:
            continue
        gamma, beta = (source.weights[f"{norm}.{kind}"].float() for kind in ("weight", "bias"))
        if rule_of(name) == "layernorm":
            found[name] = layernorm_bound(gamma, beta)
        else:
            first = f"{name.removesuffix('2')}1"
            w, b = (source.weights[f"{first}.{kind}"].float() for kind in ("weight", "bias"))
            found[name] = relu_bound(w, b, gamma, beta)
    return found


def sampled_threshold(stats: LayerStats, fraction: float) -> Tensor:
    """float32[in], one value for all channels: |x| of the sample exceeds it in `fraction` of the entries.

    Raises: ValueError unless 0 < fraction < 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction of outliers is between 0 and 1, not {fraction}")
    magnitudes = stats.sample.abs().flatten()
    beyond = min(
        len(magnitudes) - 1, int(fraction * len(magnitudes))
    )  # torch.quantile takes 16 million at most
    return magnitudes.sort(descending=True).values[beyond].expand(stats.width).clone()


def all_thresholds(
    source: SourceModel, k: float, stats: Mapping[str, LayerStats], fraction: float
) -> dict[str, Tensor]:
    """float32[in] by name: `k` sigma of the LayerNorm, and the sampled quantile for the Linears that read none.

    stats: of those Linears at least.
    """
    closed = thresholds(source.weights, source.config, k)
    needed = [name for name in quantizable(source.config) if name not in closed]
    return closed | {name: sampled_threshold(stats[name], fraction) for name in needed}


def _norm_of(name: str) -> str | None:
    """The LayerNorm that a Linear's input comes from, through a ReLU layer or not."""
    head, _, rest = name.partition(".")
    index, _, inside = rest.partition(".")
    if head != "tf_layers" or not index.isdecimal() or not inside:
        raise ValueError(f"{name} is no Linear of a layer")
    if not inside.startswith("self_attn."):
        return f"{head}.{index}.{_FEED_FORWARD[inside[:-1]]}"
    norm = _ATTENTION.get(inside.removeprefix("self_attn."))
    return None if norm is None or index == "0" else f"{head}.{int(index) - 1}.{norm}"
