"""Every reader on files that are not what they should be: it reads them or says what is wrong, and nothing else happens."""

import json
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import duramen
import tiny
from duramen.calibrate.tokens import read_documents
from duramen.problem import Problem
from malformed import Readers

NAMES = (
    "recipe", "config", "weights", "index", "formats", "codes", "masks", "plan", "search", "nested", "adapter", "results", "manifest", "release", "released results",
    "fingerprint", "stage", "checkpoint", "gguf", "rows",
)  # fmt: skip


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DURAMEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        place = tmp_path_factory.mktemp("readers") / "inside"
        place.mkdir()
        yield Readers(place)


def test_all_readers_are_here(readers):
    assert set(NAMES) == set(readers.all)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_odd_files_are_read_or_refused(name, readers):
    seen = set()

    @settings(max_examples=15, deadline=20_000, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(st.randoms(use_true_random=False))
    def one(draw):
        seen.add(readers.read(name, draw))

    one()
    assert seen


def test_what_was_read_before_is_read_again(readers):
    """Nothing of all this changed the files."""
    for name, (file, _, reader) in readers.all.items():
        if name != "gguf":  # transformers wants merges in its tokenizer, and the tiny one has none
            reader(file)


def test_a_shard_outside_the_folder_is_not_opened(tmp_path):
    folder = tiny.save("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    names = {"weight_map": {"model.embed_tokens.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    with pytest.raises(Problem, match="no safetensors file of this folder"):
        duramen.inspect(str(folder))


def test_code_beside_the_weights_is_not_run(tmp_path):
    folder = tiny.save("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for generic in (False, True):
        with pytest.raises(Problem):
            duramen.inspect(str(folder), allow_generic=generic)
    assert not (tmp_path / "ran").exists()


def test_a_missing_package_is_named_and_no_file_is_blamed(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(Problem, match="needs the package pyarrow") as caught:
        read_documents(str(tmp_path / "rows.parquet"))
    assert "pip install pyarrow" in caught.value.fix


def test_a_pickle_is_not_opened(tmp_path):
    folder = tiny.save("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Problem, match="stored as a pickle"):
        duramen.inspect(str(folder))


def test_recipes_cannot_make_python_objects_or_extend_themselves(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps:\n  - method: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(Problem, match="not valid YAML"):
        duramen.plan(str(recipe), "smollm2-135m")
    recipe.write_text(yaml.safe_dump({"extends": str(recipe), "steps": [{"method": "magnitude"}]}))
    with pytest.raises(Problem, match="extends itself"):
        duramen.plan(str(recipe), "smollm2-135m")
