"""Run: .venv/bin/python -m pytest tests/quant/test_recipe_book.py"""

import json
import re
from pathlib import Path

import pytest

from bitdgdm.infra.errors import BadInput, UnknownRecipe
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe, open_recipe, recipes


def test_every_recipe_is_found_by_its_name_and_survives_json():
    for recipe in recipes():
        assert get_recipe(recipe.name) is recipe
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_names_follow_the_scheme_of_their_fields():
    for recipe in recipes():
        if not recipe.weight_quantized:
            continue
        found = re.fullmatch(r"[a-z0-9-]+?-w(\d+)a(\d+)(-r(\d+))?(-s([\d.]+))?(-[a-z0-9-]+)?", recipe.name)
        assert found, recipe.name
        assert (int(found[1]), int(found[2])) == (recipe.weight_bits, recipe.act_bits)
        assert found[4] is None or int(found[4]) == recipe.rank
        assert found[6] is None or float(found[6]) == pytest.approx(100 * recipe.alpha)


def test_names_are_unique_and_each_recipe_says_what_it_is_what_it_costs_and_where_from():
    assert len({recipe.name for recipe in recipes()}) == len(recipes())
    for recipe in recipes():
        assert recipe.summary and recipe.source and recipe.cost
        assert not any("\n" in text for text in (recipe.summary, recipe.source, recipe.cost))


def test_no_two_recipes_do_the_same():
    contents = [{**r.to_dict(), "name": "", "summary": "", "source": "", "cost": ""} for r in recipes()]
    assert len({json.dumps(content, sort_keys=True) for content in contents}) == len(contents)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UnknownRecipe) as caught:
        get_recipe("rtn-w2a2")
    assert all(recipe.name in str(caught.value) for recipe in recipes())


@pytest.mark.parametrize(
    "content",
    [
        "{}", "[1, 2]", "not json", "[" * 100_000,
        *(json.dumps(get_recipe("rtn-w4a4").to_dict() | change) for change in (
            {"name": "../x"}, {"name": 5}, {"name": ""}, {"rank": 10**9}, {"rank": "16"}, {"rank": True}, {"act_bins": 1.5},
            {"weight_bits": 4.0}, {"alpha": "much"}, {"outlier_sigma": "3"}, {"overrides": "abc"}, {"colour": 1},
        )),
    ],
    ids=lambda text: text[:12] + text[-40:],
)  # fmt: skip
def test_a_file_that_holds_no_recipe_is_refused_with_the_command_that_writes_one(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"mine\.json holds no recipe .* bitdgdm search"):
        open_recipe(str(path))


def test_a_file_gives_the_recipe_that_was_written(tmp_path: Path) -> None:
    for recipe in recipes():
        path = tmp_path / f"{recipe.name}.json"
        path.write_text(json.dumps(recipe.to_dict()))
        assert open_recipe(str(path)) == recipe
