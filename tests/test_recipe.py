"""Recipes: YAML as written, includes, overrides, and errors that say what to try."""

import pytest

from duramen.problem import Problem
from duramen.recipe import dump_yaml, load_recipe, shipped_folder
from duramen.registry import get_method


def recipe(**step):
    return {"steps": [{"method": "multiweight", "sparsity": 0.5} | step]}


def test_patterns_and_numbers_are_read_as_written(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("seed: 010\nsteps:\n  - {method: multiweight, pattern: 2:4, tolerance: 1e-5}\n")
    loaded = load_recipe(file)
    settings = loaded.resolved()[0].settings
    assert (loaded.seed, settings.pattern, settings.tolerance) == (10, "2:4", 1e-5)


@pytest.mark.parametrize("file", sorted(shipped_folder().glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_resolve_and_say_how_to_run_them(file):
    loaded = load_recipe(file)
    assert loaded.name == file.stem
    assert loaded.resolved()
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    if any(get_method(step.method).kind == "train" for step in loaded.resolved()):
        assert f"duramen train recipes/{file.name} out/{file.stem}" in "\n".join(header)
        return
    model = {
        "token_reduction": "path/to/mamba2",
        "mamba-prune-shorten": "path/to/mamba2",
        "patch_pruning": "new",
        "quasar": "new",
        "quasar-zcu102": "new",
    }.get(file.stem, "smollm2-135m")
    assert f"duramen run recipes/{file.name} {model} out/{file.stem}" in "\n".join(header)
    assert "minutes" in header[-1]


def test_a_lock_resolves_to_itself(tmp_path):
    steps = load_recipe("quickstart").resolved()
    locked = tmp_path / "lock.yaml"
    locked.write_text(dump_yaml({"steps": [step.lock() for step in steps]}))
    assert load_recipe(locked).resolved() == steps
    assert "tolerance: 0.0001" in locked.read_text(), "every default is spelled out"


def test_extends_merges_steps_by_id(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: quickstart\nsteps:\n  - {method: multiweight, sparsity: 0.7}\n")
    base, merged = load_recipe("quickstart").resolved(), load_recipe(child).resolved()
    assert [step.id for step in merged] == [step.id for step in base]
    assert merged[0].settings.sparsity == 0.7
    assert merged[1] == base[1]


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("multiweight.sparsity=0.6", lambda r: r.resolved()[0].settings.sparsity == 0.6),
        ("multiweight.only=[q, blocks:1-2]", lambda r: r.resolved()[0].settings.only == ("q", "blocks:1-2")),
        ("seed=3", lambda r: r.seed == 3),
        ("calibration.sequences=4", lambda r: r.calibration.sequences == 4),
    ],
)
def test_overrides(override, found):
    assert found(load_recipe("quickstart", [override]))


@pytest.mark.parametrize(
    ("source", "overrides", "what", "fix"),
    [
        (recipe(sparsty=0.5), [], "no key `sparsty`", "did you mean `sparsity`"),
        (recipe(sparsity=1.2), [], "below 1, got 1.2", "sparsity: 0.012"),
        (recipe(sparsity=None, pattern="4:2"), [], "got '4:2'", '"2:4" keeps 2 of 4'),
        (recipe(block="wide"), [], "`block` is 'wide'", "duramen methods NAME"),
        (recipe(damping=-1), [], "`damping` is -1", "duramen methods NAME"),
        (recipe(effort="great"), [], "`effort` is 'great'", "duramen methods NAME"),
        (recipe(method="multiwieght"), [], "no method 'multiwieght'", "did you mean `multiweight`"),
        ({"steps": []}, [], "`steps`", ""),
        ({"steps": [{"sparsity": 0.5}]}, [], "has no `method`", "multiweight"),
        ({"stpes": [], "steps": [{"method": "magnitude", "sparsity": 0.5}]}, [], "no key `stpes`", "did you mean `steps`"),
        (recipe() | {"calibration": {"sequnces": 3}}, [], "sequnces", "did you mean `sequences`"),
        (recipe(), ["multiweight.sparsity"], "has no value", "KEY|multiweight"),
        (recipe(), ["evalute.length=3"], "no step 'evalute'", "step by its id"),
        ("quickstrat", [], "no recipe quickstrat", "did you mean `quickstart`"),
    ],
)
def test_mistakes_are_explained(source, overrides, what, fix):
    with pytest.raises(Problem, match=what) as caught:
        load_recipe(source, overrides)
    assert caught.value.why
    assert any(part in caught.value.fix for part in fix.split("|"))


@pytest.mark.parametrize(("text", "words"), [("steps: [a: b: c]", "not valid YAML"), ("- 1\n", "is not a recipe")])
def test_files_that_are_no_recipes(tmp_path, text, words):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(Problem, match=words):
        load_recipe(file)


def test_an_id_is_no_path():
    for name in ("../up", "/tmp/x", "", "."):
        with pytest.raises(Problem, match="has the id"):
            load_recipe({"steps": [{"method": "magnitude", "sparsity": 0.5, "id": name}]})


def test_what_is_extended_lies_beside_and_has_no_step_twice(tmp_path):
    base = "steps: [{method: evaluate, windows: 2}, {method: magnitude, sparsity: 0.5}]"
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nsteps: [{method: magnitude, sparsity: 0.7}]")
    assert [step["method"] for step in load_recipe(tmp_path / "child.yaml").steps] == ["evaluate", "magnitude"]
    (tmp_path / "base.yaml").write_text(base.replace("]", ", {method: evaluate, windows: 4}]"))
    with pytest.raises(Problem, match="several steps `evaluate`"):
        load_recipe(tmp_path / "child.yaml")


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ({"steps": ["magnitude"]}, "magnitude.sparsity=0.5"),
        ({"steps": None}, "a.b=1"),
        ({"calibration": 3, "steps": []}, "calibration.length=16"),
    ],
)
def test_overrides_of_what_is_no_recipe(recipe, override):
    with pytest.raises(Problem):
        load_recipe(recipe, [override])
