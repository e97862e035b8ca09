"""Recipes that nobody thought of end in a folder that opens, or in a refusal."""

import random

import pytest

import duramen
from duramen.problem import Problem
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


@pytest.mark.parametrize(("family", "words"), [("nemotron_h", "Blocks 0, 1, 3 have no mlp"), ("mamba", "have no attention")])
def test_parts_that_not_every_block_has_cannot_leave(family, words, families, tmp_path):
    folders, text = families
    step = {"method": "depth", "count": 1, "parts": words.split()[-1]}
    recipe = {"calibration": {"text": [text], "sequences": 4, "length": 24}, "steps": [step]}
    with pytest.raises(Problem, match=words):
        duramen.run(recipe, str(folders[family]), tmp_path / "out")
