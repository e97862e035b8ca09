"""The dial: targets are read or refused, the gentlest means that is enough is taken, and what is made is as small as was said."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import duramen
import tiny
from duramen import dial
from duramen.api import choose
from duramen.cli import app
from duramen.dial import RUNGS, Counts, Target
from duramen.problem import Exit, Problem
from duramen.recipe import load_recipe

SMOLLM = Counts(106_168_320, 28_311_552, 28_311_552, 35_136, 538_000_000, 272, frozenset({576, 1536}))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Small, and of widths that every format can hold."""
    return tiny.save_wide(tmp_path_factory.mktemp("model") / "wide", width=128, blocks=4, tied=True)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Little text instead of the embedded ones; the one that is measured on."""
    for name in ("learned", "other"):
        (tmp_path / f"{name}.txt").write_text(tiny.prose(len(name), 4000))
    monkeypatch.setattr(dial, "CALIBRATION", {"text": [str(tmp_path / "learned.txt")], "sequences": 16, "length": 32})
    return (str(tmp_path / "other.txt"),)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("0.5x", "size", 0.5), (".25x", "size", 0.25), ("4GB", "size", 4e9), ("1.5GiB", "size", 1.5 * 2**30), ("200MB", "size", 2e8), ("2x-faster", "speed", 2.0)],
)  # fmt: skip
def test_targets(text, kind, value):
    assert (Target.read(text).kind, Target.read(text).value) == (kind, value)


@pytest.mark.parametrize("text", ["", "2x", "0x", "0MB", "1x-faster", "0.5x-faster", "half", "4 GB", "-1GB", "4gb", "1e3MB"])
def test_what_is_no_target(text):
    with pytest.raises(Problem, match="is no target"):
        Target.read(text)


@given(st.sampled_from(sorted(RUNGS)), st.floats(0.15, 1.2))
def test_rungs_get_smaller_and_fit_where_they_can(place, share):
    most = share * SMOLLM.whole
    rungs = list(RUNGS[place](SMOLLM, most, 3_500_000))
    sizes = [rung.bytes for rung in rungs]
    assert min(sizes) == sizes[-1] or share > 1
    if min(sizes) > most:  # out of reach only with half of the blocks gone
        cut = rungs[-1].steps[0].get("target", {}).get("block_parameters", 0.5)
        assert cut == 0.5
    for rung in rungs:
        load_recipe({"steps": rung.steps or [{"method": "rtn"}]})


@pytest.mark.parametrize(("place", "target"), [("vllm", "0.75x"), ("cpu", "0.8x")])
def test_what_is_made_is_as_small_as_was_said(place, target, model, quick, tmp_path):
    found = duramen.compress(model, tmp_path / "out", target=target, place=place, text=quick)["dial"]
    assert found["reached"] <= 1.05 * found["asked"]
    assert found["reached"] >= 0.6 * found["asked"]
    kept = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert kept.name == f"wide-{target}-for-{place}"


def test_the_mixture_fills_the_target(model, quick, tmp_path):
    found = duramen.compress(model, tmp_path / "out", target="0.45x", text=quick)["dial"]
    assert 0.95 * found["asked"] <= found["reached"] <= 1.05 * found["asked"]
    widths = json.loads((tmp_path / "out" / "formats.json").read_text())
    assert {text.split()[0] for text in widths.values()} == {"W4", "W8"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target": "0.1x"}, "the least for llama.cpp is"),
        ({"target": "0.1x", "place": "vllm"}, "the least for vllm is"),
        ({"target": "2x-faster", "place": "vllm"}, "A speed in vllm cannot be chosen"),
        ({"target": "0.5x", "place": "phone"}, "is no place to run"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(given, words, model, tmp_path):
    with pytest.raises(Problem, match=words):
        duramen.compress(model, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_program_cannot_run_is_refused_at_once(tmp_path):
    with pytest.raises(Problem, match="qwen3 cannot be written as GGUF"):
        choose(tiny.save("qwen3", tmp_path / "model"), target="0.5x")


def test_the_nearest_that_is_said_is_possible(model):
    with pytest.raises(Problem) as caught:
        choose(model, target="0.1x")
    assert caught.value.code == Exit.OUT_OF_BUDGET
    nearest = caught.value.fix.split("`")[1].split()[1]
    assert choose(model, target=nearest).recipe["steps"][0]["method"] == "search"


def test_a_plan_is_a_recipe_to_keep(model, tmp_path):
    said = CliRunner().invoke(app, ["compress", str(model), str(tmp_path / "out"), "--target", "0.5x", "--plan"])
    assert said.exit_code == 0, said.output
    (tmp_path / "kept.yaml").write_text(said.output)
    assert "# taken: " in said.output
    assert [step.method for step in load_recipe(tmp_path / "kept.yaml").resolved()] == ["gptq", "export", "evaluate"]
