"""The story of a training and its release: text to a tuned model by one line, killed at any moment and gone on with, checked, measured, reported and classed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mlcroissant
import pytest
import yaml
from PIL import Image

import duramen
from duramen import api, stages
from duramen.problem import Problem
from duramen.recipe import load_recipe
from duramen.release.evidence import Wish
from duramen.release.openness import evaluate
from duramen.release.provenance import check_sums
from duramen.release.release import release, verify
from duramen.rundir import hash_file
from duramen.vision.images import SHAPES
from test_curate import document
from test_supernet import RECIPE as NETWORKS

MODEL = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": document(seed)}) + "\n" for seed in range(60)))
    small = {"data": "exercises", "batch": 8, "at_once": 8, "every": 2, "learning_rate": 1e-3}
    steps = [
        {
            "method": "curate", "sources": [{"text": str(folder / "corpus.jsonl"), "licence": "CC0-1.0"}], "held_out": 0.1, "shards": 1,
            "decontaminate": ["boolq"],
        },
        {"method": "tokenize", "vocabulary": 420},
        {"method": "pretrain", "model": MODEL, "context": 64, "steps": 6, "batch": 4, "at_once": 4, "every": 2, "held_out_rows": 2},
        {"method": "grow", "groups": 2},
        {"method": "sft", "examples": 64, "epochs": 1, "length": 64, "measure": 3, **small},
        {"method": "dpo", "examples": 40, "length": 64, **small},
        {"method": "grpo", "examples": 32, "reward": "near", "steps": 2, "answers": 4, "longest": 8, **small | {"every": 1}},
        {"method": "evaluate", "text": ["boolq"], "windows": 2, "length": 32, "prompts": ["the"], "latency": False},
    ]  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "small", "steps": steps}, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, api.train(recipe, out)


def outputs(out):
    return {file.parent.name: json.loads(file.read_text())["outputs"] for file in sorted(out.glob("stages/*/manifest.json"))}


def test_text_becomes_a_model_that_opens_anywhere(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, results = whole
    model, spoken = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.num_hidden_layers == 4
    asked = spoken.apply_chat_template(
        [{"role": "user", "content": "Spell moon."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**asked, max_new_tokens=4, pad_token_id=0).shape[1] > asked["input_ids"].shape[1]
    kept, locked = (load_recipe(out / name) for name in ("recipe.yaml", "recipe.lock.yaml"))
    assert kept.resolved() == locked.resolved()
    assert [step.method for step in kept.resolved()][-1] == "evaluate"
    assert [stage["method"] for stage in results["stages"]] == ["curate", "tokenize", "pretrain", "grow", "sft", "dpo", "grpo"]
    assert results["evaluations"][0]["perplexity"]
    assert results["stages"][4]["found"]["exercises"]["after"]["count"] == 3


def test_every_stage_says_what_went_in_and_came_out(whole):
    out, _ = whole
    for file in sorted(out.glob("stages/*/manifest.json")):
        kept = json.loads(file.read_text())
        assert kept["versions"]["duramen"]
        assert kept["seconds"] > 0
        assert kept["machine"]["threads"]
        assert kept["outputs"]
        for name, hashes in kept["inputs"].items():
            maker = next(other for other in out.glob(f"stages/*/{name}"))
            assert hashes
            assert maker.is_dir()
    pretrained = json.loads((out / "stages" / "02-pretrain" / "manifest.json").read_text())
    assert set(pretrained["inputs"]) == {"data", "tokens", "tokenizer"}
    assert "model/model.safetensors" in pretrained["outputs"]
    assert any(name.startswith("checkpoints/") for name in pretrained["outputs"])
    kept = json.loads((out / "manifest.json").read_text())
    assert "stages/02-pretrain/manifest.json" in kept["measured"]
    assert "stages/02-pretrain/model/model.safetensors" in kept["files"]
    assert not any("/work/" in name for name in kept["files"]), "what stages need only while they run is gone"


def test_the_report_tells_the_story(whole):
    page = (whole[0] / "report.html").read_text()
    for words in (
        "Curation",
        "near duplicates",
        "bytes a token",
        "Pretraining",
        "tokens a second",
        "Depth expansion",
        "exercises",
        "CC0-1.0",
    ):
        assert words in page, words
    assert page.count("<svg") >= 4


def test_killed_it_ends_with_the_same_bytes(recipe, whole, tmp_path):
    """Killed as soon as a stage has its first checkpoint; the stages before it are taken from the whole run."""
    out, stage = tmp_path / "out", "05-dpo"
    shutil.copytree(whole[0] / "stages", out / "stages")
    later = sorted(folder.name for folder in (out / "stages").iterdir() if folder.is_dir() and folder.name >= stage)
    for name in later:
        shutil.rmtree(out / "stages" / name)
    line = [sys.executable, "-m", "duramen", "train", str(recipe), str(out)]
    worker = subprocess.Popen(
        line, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while worker.poll() is None and not list((out / "stages" / stage).glob("*/*/manifest.json")):
        time.sleep(0.002)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert not (out / "stages" / later[-1] / "manifest.json").is_file()
    api.train(recipe, out)
    assert outputs(out) == outputs(whole[0])


def test_a_stage_that_was_changed_is_not_used(recipe, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (out / "manifest.json").unlink()
    file = out / "stages" / "02-pretrain" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(Problem, match=r"02-pretrain/model/model\.safetensors was changed"):
        api.train(recipe, out)
    file.unlink()
    with pytest.raises(Problem, match="is missing"):
        api.train(recipe, out)


def test_another_recipe_in_the_same_folder_is_refused(recipe, whole):
    with pytest.raises(Problem, match=r"differs in:\n    steps\[2\]\.steps: 6 -> 7"):
        api.train(recipe, whole[0], overrides=["pretrain.steps=7"])


def test_a_later_stage_may_change_until_a_step_works_on_the_model(recipe, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0] / "stages", out / "stages")
    said = {}
    api.train(recipe, out, overrides=["grpo.steps=1"], progress=lambda event, fields: said.update({event: fields}))
    assert said["changed"]["steps"] == ["steps[6].steps: 2 -> 1"]
    assert (out / "stages" / ".duramen" / "aside" / "06-grpo-0" / "manifest.json").is_file()
    assert json.loads((out / "stages" / "06-grpo" / "manifest.json").read_text())["settings"]["steps"] == 1
    assert outputs(out) | {"06-grpo": 0} == outputs(whole[0]) | {"06-grpo": 0}
    assert api.load_results(out)["stages"][6]["settings"]["steps"] == 1


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"method": "magnitude", "sparsity": 0.5}], "trains nothing"),
        ([{"method": "evaluate"}, {"method": "grow"}], "comes after steps"),
        (
            [{"method": "curate", "sources": [{"text": "squad"}]}, {"method": "evaluate", "tasks": ["piqa"], "text": []}],
            "measured on piqa",
        ),
        ([{"method": "tokenize"}], "has no data"),
        ([{"method": "sft", "data": "exercises"}], "has no model"),
    ],
)
def test_recipes_that_cannot_be(steps, words, tmp_path):
    with pytest.raises(Problem, match=words):
        api.train({"steps": steps}, tmp_path / "out")


def test_a_stage_is_not_run_on_a_model(recipe, llama, tmp_path):
    with pytest.raises(Problem, match="stage of training"):
        duramen.run(str(recipe), str(llama), tmp_path / "out")


def test_a_plan_says_what_it_will_take(capsys):
    found = stages.forecast_stages(load_recipe("laptop-10m"))
    (pretrained,) = (stage for stage in found["stages"] if "bytes" in stage)
    assert 9e6 < pretrained["parameters"] < 11e6
    assert found["then"] == ["evaluate"]


@pytest.fixture
def released(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (out / "report.md").write_text("# How it was made\n\nBy the recipe.\n")
    return out, release(out, Wish(report="report.md", paper="report.md", producer="the tests"))


def test_its_own_manifests_make_it_class_one(released, whole):
    out, found = released
    assert (found["class"], found["label"]) == (1, "Class I - Open Science Model")
    assert found["profiles"]["mot"]["class"] == 1
    assert found["missing"]["1"] == []
    listed = {each["name"]: each for each in found["components"]}
    for each in listed.values():
        assert all((out / file).is_file() for file in each["files"]), each["name"]
    assert listed["Datasets"]["licence"] == "CC0-1.0"
    assert listed["Evaluation data"]["licence"] == "CC-BY-SA-3.0"
    assert release(whole[0], Wish())["class"] == 0, "without a report"
    assert release(whole[0], Wish())["missing"]["3"] == ["Technical report: add it (what the model can do and how to use it)."]
    shutil.rmtree(whole[0] / "release")


def test_the_same_folder_gives_the_same_bytes(released):
    out, _ = released
    before = {file.name: file.read_bytes() for file in (out / "release").iterdir()}
    shutil.rmtree(out / "release")
    release(out, Wish(report="report.md", paper="report.md", producer="the tests"))
    assert {file.name: file.read_bytes() for file in (out / "release").iterdir()} == before


@pytest.mark.filterwarnings("ignore:ConjunctiveGraph:DeprecationWarning")
def test_what_it_writes_is_what_others_read(released):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from huggingface_hub import DatasetCard, ModelCard

    out, _ = released
    text = (out / "release" / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert {part["name"] for part in json.loads(text)["components"]} >= {"duramen", "torch", "transformers"}
    assert ModelCard.load(out / "README.md").data.library_name == "transformers"
    card = DatasetCard.load(out / "release" / "DATA_CARD.md")
    assert card.data.license_name == "CC0-1.0"
    assert "near duplicates" in card.text
    framework = yaml.safe_load((out / "release" / "mof.yml").read_text())
    check_framework(framework)
    assert evaluate(framework["release"]).level == 1
    described = json.loads((out / "release" / "croissant.json").read_text())
    assert described["distribution"][0]["sha256"] == hash_file(out / described["distribution"][0]["name"])
    whole = mlcroissant.Dataset(out / "release" / "croissant.json")
    assert not whole.metadata.issues.errors
    first = described["distribution"][0]["name"]
    document = json.loads((out / first).read_text().splitlines()[0])
    read = next(iter(whole.records(f"{first}#documents")))
    assert read[f"{first}#text"].decode() == document["text"]
    assert read[f"{first}#source"].decode() == document["metadata"]["source"]
    said = subprocess.run(
        [sys.executable, str(out / "release" / "inference.py"), "the"], capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("the")
    page = (out / "release" / "index.html").read_text()
    assert "Class I - Open Science Model" in page
    assert "Evaluation data" in page


def check_framework(found):
    """The constraints of the evaluator's schema, in our words."""
    assert found["framework"]["name"] == "Model Openness Framework"
    assert all(isinstance(found["framework"][key], str) for key in ("name", "version", "date"))
    inner = found["release"]
    assert {"name", "license", "producer", "components"} <= set(inner)
    assert inner["name"]
    assert inner["type"] in ("", "language", "vision", "image", "audio", "video", "3d", "code", "multimodal", "other")
    assert inner.get("treatment", "pre-trained") in ("pre-trained", "instruct fine-tuned", "chat fine-tuned")
    assert len(inner["components"]) <= 17
    for each in inner["components"]:
        assert all(
            isinstance(each.get(key, ""), str) for key in ("name", "description", "license", "license_path", "component_path")
        )
    for each in inner["license"].values():
        assert all(each[key] is None or isinstance(each[key], str) for key in ("name", "path"))


def sums_again(out):
    (out / "release" / "SHA256SUMS").write_text(check_sums(out))


def changed(file, old, new):
    text = file.read_text()
    assert old in text
    file.unlink()
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("case", ["none", "byte", "missing", "new", "licence", "verdict", "shard", "truncated", "result"])
def test_verify_finds(case, released):
    out, _ = released
    shard = next((out / "stages" / "00-curate" / "data" / "train").iterdir())
    if case == "byte":
        changed(out / "config.json", "llama", "lIama")
    elif case == "missing":
        (out / "tokenizer.json").unlink()
    elif case == "new":
        (out / "extra.txt").write_text("?")
    elif case == "licence":
        changed(out / "release" / "mof.yml", "Apache-2.0", "MIT")
        sums_again(out)
    elif case == "verdict":
        changed(out / "release" / "verdict.json", '"class": 1', '"class": 2')
        sums_again(out)
    elif case in ("shard", "truncated"):
        content = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(content[:-40])
        if case == "shard":
            sums_again(out)
    elif case == "result":
        changed(out / "results.json", '"samples": 2', '"samples": 3')
    wrong = verify(out)
    expected = {
        "none": "", "byte": "config.json was changed", "missing": "tokenizer.json is missing", "new": "extra.txt is not listed",
        "licence": "mof.yml does not say what the files prove", "verdict": "the verdict's class is 2, and the files give 1",
        "shard": "is not what was made", "truncated": "was changed", "result": "results.json was changed",
    }[case]  # fmt: skip
    assert wrong == [] if case == "none" else any(expected in line for line in wrong), wrong


def test_a_release_gates(released, capsys):
    out, _ = released
    assert release(out, Wish(report="report.md", paper="report.md"), required=1)["class"] == 1
    with pytest.raises(Problem, match="class II is required") as caught:
        release(out, Wish(), required=2)
    assert "Technical report" in caught.value.what


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish(licences={"code": "Apache 2"}), "no SPDX licence"),
        (Wish(report="nowhere.md"), "no file"),
    ],
)
def test_wishes_that_cannot_be(wish, words, released):
    with pytest.raises(Problem, match=words):
        release(released[0], wish)


def test_a_model_that_was_compressed_keeps_its_base_s_terms(llama, texts, tmp_path):
    steps = [
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "evaluate", "text": [str(texts[1])], "length": 32, "windows": 2, "latency": False},
    ]
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    recipe = {"calibration": {"text": [str(texts[0])], "sequences": 4, "length": 32}, "steps": steps}
    duramen.run(recipe, str(base), tmp_path / "out")
    found = release(tmp_path / "out", Wish(base_licence="Apache-2.0"))
    assert found["class"] == 0
    assert {line.split(":")[0] for line in found["missing"]["3"]} == {"Data card", "Technical report"}
    assert {"Datasets", "Training code"} <= {name for name, status in found["statuses"].items() if status == "missing"}
    weights = next(each for each in found["components"] if each["name"] == "Model parameters (Final)")
    assert weights["licence"] == "Apache-2.0"
    bill = json.loads((tmp_path / "out" / "release" / "sbom.cdx.json").read_text())
    assert any(part["type"] == "machine-learning-model" and part["name"] == str(base) for part in bill["components"])
    with pytest.raises(Problem, match="cannot be put under MIT"):
        release(tmp_path / "out", Wish(base_licence="Apache-2.0", licences={"data": "MIT"}))
    (tmp_path / "out" / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    with pytest.raises(Problem, match="Two licences conflict"):
        release(tmp_path / "out", Wish(base_licence="MIT"))
    (tmp_path / "out" / "secret").symlink_to("/etc/hostname")
    with pytest.raises(Problem, match="is a link to"):
        release(tmp_path / "out", Wish())
    with pytest.raises(Problem, match="is no model"):
        release(tmp_path, Wish())
    with pytest.raises(Problem, match="has no release"):
        verify(llama)


def test_a_model_of_images_is_released_too(tmp_path):
    steps = [
        {"method": "train_images", "steps": 1, "every": 1, "batch": 8, "at_once": 8},
        {"method": "evaluate_images", "batches": [1]},
    ]
    out = tmp_path / "out"
    duramen.run(NETWORKS | {"steps": steps}, "new", out)
    found = release(out, Wish())
    assert {line.split(":")[0] for line in found["missing"]["3"]} == {"Data card", "Technical report"}
    assert {name for name in ("Training code", "Evaluation data") if found["statuses"][name] == "included"}
    assert yaml.safe_load((out / "release" / "mof.yml").read_text())["release"]["type"] == "vision"
    assert verify(out) == []
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    said = subprocess.run(
        [sys.executable, str(out / "release" / "inference.py"), str(tmp_path / "red.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() in SHAPES
