"""Recipes that nobody thought of end in a folder that opens, or in a refusal."""

import random

import pytest

from soaking import carried_out, draw_recipe, prepared


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("soaking"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(8))
def test_drawn_recipes(number, families, tmp_path):
    folders, text = families
    draw = random.Random(number)
    family = draw.choice(list(folders))
    assert carried_out(draw_recipe(draw, family, text), folders[family], tmp_path / "out") in ("opened again", "refused")
