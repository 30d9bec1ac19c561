"""The networks that benchmarks/engine.py compares: the shipped one by recipe, and one of MOSES dims.

Guarantees: a quantized network is what `bitdgdm quantize` makes.
Knows nothing of: time, molecules.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from bitdgdm.infra.errors import KernelsUnavailable
from bitdgdm.models.calibrate import calibrate
from bitdgdm.models.checkpoint_config import known_datasets
from bitdgdm.models.digress import build, quantizable
from bitdgdm.models.digress_config import QM9_NO_H, DigressConfig, Dims, HiddenDims
from bitdgdm.models.kernel_engine import KernelEngine
from bitdgdm.models.source import load_source
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.recipe_book import get_recipe

MODEL, OURS = "builtin:digress-qm9", "our kernels bf16"


def our_engines(recipes: Sequence[str], say: Callable[[str], None] = print) -> dict[str, KernelEngine]:
    """bf16, and those of `recipes` that the kernels take; say is told of others."""
    source = load_source(MODEL)
    found = {OURS: KernelEngine(build(source.config, source.weights), source.config, MODEL)}
    for recipe in recipes:
        try:
            found[f"our kernels {recipe}"] = KernelEngine(quantized(recipe), source.config, f"{MODEL} {recipe}")
        except KernelsUnavailable as refused:
            say(f"{recipe}: {refused}")
    return found


def quantized(name: str) -> nn.Module:
    """The shipped network by a recipe, as `bitdgdm quantize` and loading the artifact would give it."""
    source, recipe = load_source(MODEL), get_recipe(name)
    network, layers = build(source.config, source.weights), quantizable(source.config)
    seen = calibrate(source, layers, choice=recipe.calibration, device="cuda") if recipe.needs_calibration else {}
    for layer in layers:
        linear = network.get_submodule(layer)
        parts = decompose(linear.weight, recipe, seen.get(layer), contributions=False)[0]
        owner, _, attribute = layer.rpartition(".")
        setattr(network.get_submodule(owner), attribute, QuantLinear.from_parts(parts, linear.bias, recipe))
    return network


def moses_config() -> DigressConfig:
    """The published dims of DiGress for MOSES."""
    stats = {k: tuple(v) if isinstance(v, list) else v for k, v in known_datasets()["moses"].items()}
    for name in ("node_marginals", "edge_marginals", "n_nodes"):
        stats[name] = tuple(v / sum(stats[name]) for v in stats[name])
    return replace(
        QM9_NO_H, n_layers=12, n_pad=len(stats["n_nodes"]) - 1, input_dims=Dims(16, 5, 13), hidden_mlp_dims=Dims(256, 128, 256),
        hidden_dims=HiddenDims(256, 64, 128, 8, 256, 128), output_dims=Dims(8, 5, 0), **stats,
    )  # fmt: skip


def network_bf16() -> nn.Module:
    source = load_source(MODEL)
    return build(source.config, source.weights).to("cuda", torch.bfloat16)
