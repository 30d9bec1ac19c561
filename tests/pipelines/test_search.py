"""Run: .venv/bin/python -m pytest tests/pipelines/test_search.py"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bitdgdm.infra.errors import BadInput
from bitdgdm.models.digress import GraphTransformer, quantizable
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.divergence import divergence, held_out_states
from bitdgdm.models.engine import load_engine
from bitdgdm.models.source import save_source, source_model
from bitdgdm.pipelines import search_losses
from bitdgdm.pipelines.quantize import quantize
from bitdgdm.pipelines.search import FULL, Asked, Searched, document, groups_of, search, write_recipe
from bitdgdm.pipelines.search_losses import Journal, Measured
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import open_recipe

SMALL = dataclasses.replace(QM9_NO_H, n_layers=2)
ASKED = Asked(bits=6.0, candidates=("rtn-w8a8", "rtn-w4a8", "rtn-w4a4"), molecules=4, steps=2, check=8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "small.safetensors"
    state = GraphTransformer(SMALL).state_dict()
    rounded = {name: t.half().float() for name, t in state.items()}  # an artifact keeps the rest in 16 bit
    save_source(path, source_model(SMALL, rounded, "small"))
    return path


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDGDM_HOME", str(shared_home))


@pytest.fixture(scope="module")
def found(source: Path, shared_home: Path) -> Searched:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITDGDM_HOME", str(shared_home))
        return search(str(source), ASKED, "mixed", device="cpu", quiet=True)


def test_the_file_quantizes_to_the_network_that_was_measured(
    source: Path, found: Searched, tmp_path: Path
) -> None:
    write_recipe(found.recipe, tmp_path / "mixed.json")
    made = quantize(
        str(source),
        str(tmp_path / "mixed.json"),
        out=tmp_path / "q.safetensors",
        executor="local",
        quiet=True,
    )
    assert made.bits_per_weight == pytest.approx(found.bits_per_weight, rel=1e-9)
    states = held_out_states(SMALL, molecules=8)
    reference, engine = (load_engine(p, device="cpu") for p in (source, tmp_path / "q.safetensors"))
    assert divergence(reference, engine, states).kl == pytest.approx(found.held_out_kl, rel=1e-6)


def test_the_mixture_keeps_the_budget_and_loses_less_than_any_one_recipe_that_keeps_it(
    found: Searched,
) -> None:
    assert found.exact and found.bits_per_weight <= 6.0
    alone = sum(row["rtn-w4a8"] for row in found.losses.values())
    assert found.predicted_kl <= alone
    assert len(set(found.picked.values())) > 1


def test_the_prediction_is_the_sum_of_single_losses_and_stands_beside_the_measured_loss(
    found: Searched,
) -> None:
    assert found.predicted_kl == pytest.approx(sum(found.losses[g][o] for g, o in found.picked.items()))
    told = json.loads(json.dumps(document(found)))
    assert {"predicted_kl", "measured_kl", "held_out_kl"} <= told.keys()
    assert 0 < told["measured_kl"] < 1 and 0.2 < told["predicted_kl"] / told["measured_kl"] < 5
    assert Recipe.from_dict(told["recipe"]) == found.recipe


def test_full_precision_is_always_an_option_and_loses_nothing(found: Searched) -> None:
    assert all(row[FULL.name] == 0.0 for row in found.losses.values())


def test_a_second_search_measures_nothing_again(
    source: Path, found: Searched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(search_losses, "loss", never)
    again = search(str(source), ASKED, "mixed", device="cpu", quiet=True)
    assert again == found


def test_other_states_are_measured_anew(
    source: Path, found: Searched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(search_losses, "loss", counted)
    with pytest.raises(InterruptedError):
        search(str(source), dataclasses.replace(ASKED, seed=1), "mixed", device="cpu", quiet=True)


def test_a_line_cut_off_by_a_kill_costs_that_measurement_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.add("a", Measured(10, 0.5))
    journal.add("b", Measured(20, 0.25))
    whole = (tmp_path / "j.jsonl").read_bytes()
    (tmp_path / "j.jsonl").write_bytes(whole[:-3])
    cut = Journal(tmp_path / "j.jsonl")
    assert cut.found == {"a": Measured(10, 0.5)}
    cut.add("c", Measured(30, 0.125))
    assert Journal(tmp_path / "j.jsonl").found == {"a": Measured(10, 0.5), "c": Measured(30, 0.125)}


@pytest.mark.parametrize("by", ["kind", "layer"])
def test_a_pattern_matches_its_own_layers_only(by: str) -> None:
    names = quantizable(QM9_NO_H)
    groups = groups_of(names, by)
    assert sorted(n for members in groups.values() for n in members) == sorted(names)
    picked = {pattern: "b" if i % 2 else "a" for i, pattern in enumerate(groups)}
    recipe = Recipe(
        "a", 4, 4, overrides=tuple((p, (("weight_bits", 8),)) for p, o in picked.items() if o == "b")
    )
    for pattern, members in groups.items():
        assert {recipe.for_layer(n).weight_bits for n in members} == {8 if picked[pattern] == "b" else 4}


def test_a_speed_budget_is_kept_on_its_chip(source: Path) -> None:
    asked = dataclasses.replace(ASKED, bits=None, speedup=3.0, chip="a100", check=0)
    fast = search(str(source), asked, "fast", device="cpu", quiet=True)
    assert fast.speedup >= 3.0 and fast.held_out_kl is None
    assert "rtn-w4a4" in fast.picked.values()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bits": 3.0}, "reach 4.* bits a weight at best"),
        ({"bits": None, "speedup": 9.0}, "times the speed of bf16 at best"),
        ({"bits": None}, "one budget"),
        ({"speedup": 2.0}, "one budget"),
        ({"chip": "abacus"}, "no rates are known"),
        ({"by": "colour"}, "by kind or by layer"),
        ({"candidates": ("w16",)}, "no recipe of one layer"),
        ({"candidates": ("missing.json",)}, "no recipe file"),
    ],
    ids=str,
)
def test_what_can_not_be_searched_is_refused_with_the_way_out(
    source: Path, found: Searched, change: dict[str, object], told: str
) -> None:
    with pytest.raises(BadInput, match=told):
        search(str(source), dataclasses.replace(ASKED, **change), "mixed", device="cpu", quiet=True)


def test_a_file_that_holds_no_recipe_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"name": "x"}', '{"name": "x", "weight_bits": 4, "act_bits": 4, "colour": 1}'):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(BadInput, match="holds no recipe"):
            open_recipe(str(tmp_path / "r.json"))
