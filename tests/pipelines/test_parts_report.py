"""Run: .venv/bin/python -m pytest tests/pipelines/test_parts_report.py

What the parts of a layer cost and are worth, against sums over the stored tensors and decompositions without a part.
"""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bitdgdm.pipelines.catalog import show_model
from bitdgdm.pipelines.parts_report import LayerParts, Part, by_kind, layer_parts
from bitdgdm.pipelines.parts_tables import kinds_table, layers_table
from bitdgdm.quant.artifact import Artifact, ArtifactHeader
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.parts import merged
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe

LAYERS = ("tf_layers.0.linX1", "tf_layers.1.linX1", "tf_layers.0.self_attn.e_out")


def artifact_of(recipe: Recipe, seed: int = 0) -> tuple[Artifact, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in LAYERS:
        w = torch.randn(48, 32, generator=generator) + 9 * torch.randn(
            48, 2, generator=generator
        ) @ torch.randn(2, 32, generator=generator)
        w[5, 7] = 60.0
        weights[name] = w
    made = {name: decompose(w, recipe) for name, w in weights.items()}
    header = ArtifactHeader(recipe, {n: r for n, (_, r) in made.items()}, 9, {}, {}, "test")
    return Artifact(header, {n: (p, None, None) for n, (p, _) in made.items()}, {}, ""), weights


def test_the_costs_of_all_parts_add_up_to_what_is_stored() -> None:
    artifact, _ = artifact_of(get_recipe("bitdgdm-w4a4-r16-s1"))
    for layer in layer_parts(artifact):
        parts, _, _ = artifact.layers[layer.layer]
        stored = sum(8 * t.numel() * t.element_size() for t in parts.tensors().values())
        assert layer.weights * (layer.rest + sum(p.bits for p in layer.parts)) == pytest.approx(stored)
        assert {p.name for p in layer.parts} == {"low rank", "sparse", "outliers of the input"}


def test_a_part_is_worth_the_bits_that_would_take_its_place() -> None:
    recipe = get_recipe("bitdgdm-w4a4-r16-s1")
    artifact, weights = artifact_of(recipe)
    for layer in layer_parts(artifact):
        w = weights[layer.layer]
        found = {p.name: p for p in layer.parts}
        for name, change in (("low rank", {"rank": 0}), ("sparse", {"alpha": 0.0})):
            less = decompose(w, dataclasses.replace(recipe, **change))[0]
            error = float((w - merged(less)).norm() / w.norm())
            part = found[name]
            assert part.without == pytest.approx(error, rel=1e-4)
            assert part.worth == pytest.approx(math.log2(error / layer.error), rel=1e-4, abs=1e-4)
            assert part.earns == (part.worth >= part.bits)


def test_a_weight_that_is_of_low_rank_but_for_noise_earns_its_low_rank_part() -> None:
    """Rank 2 holds nearly all of it, so two components save more than the bits they store."""
    recipe = Recipe("test-w4a4-r2", 4, 4, rank=2, factor_bits=8)
    found = layer_parts(artifact_of(recipe)[0])
    assert all(p.name == "low rank" and p.without is not None for layer in found for p in layer.parts)
    generator = torch.Generator().manual_seed(1)
    w = 0.01 * torch.randn(256, 256, generator=generator) + torch.randn(
        256, 2, generator=generator
    ) @ torch.randn(2, 256, generator=generator)
    parts, report = decompose(w, Recipe("test-w4a4-r2", 4, 4, rank=2))
    header = ArtifactHeader(recipe, {"x": report}, 9, {}, {}, "test")
    (layer,) = layer_parts(Artifact(header, {"x": (parts, None, None)}, {}, ""))
    assert layer.parts[0].earns is True and layer.parts[0].worth is not None and layer.parts[0].worth > 2


def test_what_is_not_known_is_not_judged() -> None:
    artifact, _ = artifact_of(get_recipe("bitdgdm-w4a4-r16-s1"))
    outliers = [
        p for layer in layer_parts(artifact) for p in layer.parts if p.name == "outliers of the input"
    ]
    assert [(p.bits, p.without, p.worth, p.earns) for p in outliers] == [(0.0, None, None, None)] * 3
    assert all(layer.parts == () for layer in layer_parts(artifact_of(get_recipe("rtn-w4a4"))[0]))


def test_a_kind_is_the_mean_over_its_weights() -> None:
    def layer(kind: str, weights: int, error: float, worth: float) -> LayerParts:
        part = Part("sparse", 0.5, error * 2**worth, worth, worth >= 0.5)
        return LayerParts(f"{kind}.{weights}", kind, weights, "weight", error, 4.0, (part,))

    small, large = by_kind(
        [layer("q", 100, 0.1, 1.0), layer("q", 300, 0.2, 0.2), layer("e_out", 10, 0.3, 0.0)]
    )[::-1]
    assert (small.kind, large.kind) == ("q", "e_out")
    name, bits, worth, earns = small.parts[0]
    assert (name, bits, earns, small.layers) == ("sparse", pytest.approx(0.5), 1, 2)
    assert worth == pytest.approx((100 * 1.0 + 300 * 0.2) / 400)
    assert small.error == pytest.approx(math.sqrt((100 * 0.01 + 300 * 0.04) / 400))


def test_the_tables_show_every_layer_and_a_verdict_of_each_part(tmp_path: Path) -> None:
    found = layer_parts(artifact_of(get_recipe("bitdgdm-w4a4-r16-s1"))[0])
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(layers_table(found), kinds_table(found))
    text = console.export_text()
    assert all(name in text for name in LAYERS) and ("yes" in text or "no" in text) and "of 2" in text


def test_a_source_model_has_no_parts() -> None:
    assert show_model("builtin:digress-qm9", parts=True).parts == []
