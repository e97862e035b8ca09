"""Orders in which a step would undo an earlier one are refused before anything runs; the others are not."""

import pytest

import duramen
from duramen.order import check_order
from duramen.problem import Problem
from duramen.recipe import Recipe, load_recipe, shipped_folder
from test_story import write_recipe

STEPS = {
    "prune": {"method": "magnitude", "sparsity": 0.5},
    "prune in a pattern": {"method": "wanda", "pattern": "2:4"},
    "shrink": {"method": "flap", "ratio": 0.2, "round_to": 1, "minimum": 2},
    "search": {"method": "search", "target": {"parameters": 0.8}},
    "drop": {"method": "depth", "count": 1},
    "round": {"method": "rtn", "format": "W4 g8"},
    "smooth": {"method": "smooth"},
    "rotate": {"method": "rotate"},
    "refit": {"method": "refit"},
    "rora": {"method": "rora"},
    "qat": {"method": "qat"},
    "shorten": {"method": "token_reduction"},
    "measure": {"method": "evaluate", "text": ["boolq"], "context": 8, "length": 64},
    "export": {"method": "export", "form": "gguf"},
}
AFTER = {
    "prune": ["rotate"],
    "prune in a pattern": ["rotate", "shrink", "search"],
    "round": ["prune", "prune in a pattern", "shrink", "search", "drop", "smooth", "rotate", "refit"],
    "qat": ["prune", "prune in a pattern", "shrink", "search", "drop", "smooth", "rotate", "refit"],
    "shorten": ["prune", "prune in a pattern", "shrink", "search", "drop", "round", "smooth", "rotate", "refit", "rora", "qat"],
}
"""What cannot follow what."""


def resolved(*names):
    steps = [STEPS[name] | {"id": name} for name in names]
    return Recipe.model_validate({"steps": steps}).resolved()


@pytest.mark.parametrize("first", STEPS)
def test_what_can_follow_what(first):
    for second in STEPS:
        steps = resolved(first, second) if first != second else resolved(first)
        if second in AFTER.get(first, ()):
            with pytest.raises(Problem, match=f"`{second}` cannot follow `{first}`") as caught:
                check_order(steps)
            assert caught.value.fix == f"`{second}` before it."
            check_order(reversed(steps))
        else:
            check_order(steps)


def test_rounded_inputs_are_no_codes():
    check_order(Recipe.model_validate({"steps": [{"method": "rtn", "format": "A8KV4"}, STEPS["prune"]]}).resolved())


def test_a_prune_of_named_layers_takes_their_codes_alone():
    check_order(Recipe.model_validate({"steps": [STEPS["round"], STEPS["prune"] | {"only": ["q"]}]}).resolved())


def test_steps_in_between_change_nothing():
    with pytest.raises(Problem, match="`prune` cannot follow `round`"):
        check_order(resolved("round", "rora", "measure", "prune"))


@pytest.mark.parametrize("file", sorted(shipped_folder().glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_in_order(file):
    check_order(load_recipe(file).resolved())


def test_what_a_folder_holds_counts_too(llama, texts, tmp_path):
    steps = [{"method": "rtn", "format": "W4A8 g8"}]
    duramen.run(write_recipe(tmp_path / "first.yaml", texts, steps=steps, evaluate=False), str(llama), tmp_path / "out")
    again = write_recipe(tmp_path / "second.yaml", texts, steps=[{"method": "magnitude", "sparsity": 0.5}], evaluate=False)
    for refused in (
        lambda: duramen.run(again, str(tmp_path / "out"), tmp_path / "more"),
        lambda: duramen.plan(again, str(tmp_path / "out")),
    ):
        with pytest.raises(Problem, match=r"`magnitude` cannot follow the model itself \(codes.safetensors\)"):
            refused()
    assert not (tmp_path / "more").exists()
