"""Shipped recipes of several methods, on small models: what each step leaves is still there at the end."""

import json

import pytest

import duramen
import tiny
from duramen.problem import Problem
from duramen.recipe import load_recipe
from test_token_step import step as token_step

SHORT = {
    "rora.steps": 2, "rora.batch": 2, "rora.at_once": 2, "search.round_to": 32, "search.generations": 1, "search.offspring": 4, "search.levels": 4,
    "fusion.round_to": 32, "fusion.ratio": 0.25, "fusion.gradient_sequences": 4, "fusion.gradient_length": 16,
}  # fmt: skip


def run(name, model, tmp_path, **more):
    """A shipped recipe with little text and few steps."""
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(tiny.prose(number, 4000))
    given = {
        "evaluate.text": [str(tmp_path / "1.txt")],
        "evaluate.length": 64,
        "evaluate.windows": 2,
        "evaluate.new_tokens": 2,
        "dtype": "float32",
    } | more
    given |= {"calibration.text": [str(tmp_path / "0.txt")], "calibration.sequences": 16, "calibration.length": 32}
    methods = {step.method for step in load_recipe(name).resolved()}
    given |= {key: value for key, value in SHORT.items() if key.split(".")[0] in methods}
    return duramen.run(
        name, str(model), tmp_path / "out", overrides=[f"{key}={json.dumps(value)}" for key, value in given.items()]
    )


@pytest.fixture
def wide(tmp_path):
    """A model whose widths fit blocks of 32."""
    return tiny.save_wide(tmp_path / "wide", width=64, blocks=2)


def test_pruned_healed_and_rounded_it_keeps_zeros_and_grids(wide, tmp_path):
    found = run("prune-heal-gguf", wide, tmp_path)
    held = duramen.inspect(str(tmp_path / "out"))
    assert held["masks"]["removed"] >= 0.499 * held["masks"]["size"]
    assert not held["masks"]["broken"]
    assert not held["codes"]["broken"]
    (export,) = found["exports"]
    assert export["coded"] == 14
    assert export["bytes"] == (tmp_path / "out" / export["file"]).stat().st_size


def test_cut_distilled_and_rounded_it_is_smaller_and_runs_elsewhere(wide, tmp_path):
    found = run("cut-distil-onnx", wide, tmp_path)
    shape = found["steps"][0]["shape"]["parameters"]
    assert shape["after"] < shape["before"]
    assert not duramen.inspect(str(tmp_path / "out"))["codes"]["broken"]
    (export,) = found["exports"]
    assert export["form"] == "onnx"
    assert all(ran["prompts"] for ran in export["ran"].values())


def test_blocks_that_differ_have_no_onnx(wide, tmp_path):
    (tmp_path / "text.txt").write_text(tiny.prose(0, 4000))
    steps = [
        {
            "method": "search",
            "target": {"block_parameters": 0.8},
            **{key.split(".")[1]: value for key, value in SHORT.items() if key.startswith("search")},
        }
    ]
    recipe = {
        "calibration": {"text": [str(tmp_path / "text.txt")], "sequences": 16, "length": 32},
        "steps": [*steps, {"method": "export", "form": "onnx"}],
    }
    with pytest.raises(Problem, match="differ in shape"):
        duramen.run(recipe, str(wide), tmp_path / "out")


def test_a_state_space_model_keeps_its_pattern_and_reads_shorter(tmp_path):
    folder = tiny.save("mamba2", tmp_path / "model")
    short = {
        f"token_reduction.{key}": value
        for key, value in token_step(choose=False, sites=[0]).items()
        if key not in ("method", "id")
    }
    run(
        "mamba-prune-shorten",
        folder,
        tmp_path,
        **{"evaluate.context": 32, "multiweight.only": ["*in_proj", "*out_proj"]},
        **short,
    )
    held = duramen.inspect(str(tmp_path / "out"))
    assert held["masks"]["removed"] == held["masks"]["size"] / 2
    assert duramen.load(tmp_path / "out").reduced is not None
