"""The story of a training: text to a tuned model by one line, killed at any moment and gone on with, checked, measured and reported."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

import duramen
from duramen import api, stages
from duramen.problem import Problem
from duramen.recipe import load_recipe
from test_curate import document

MODEL = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": document(seed)}) + "\n" for seed in range(60)))
    (folder / "exam.txt").write_text(" ".join(document(seed) for seed in range(200, 204)))
    small = {"data": "exercises", "batch": 8, "at_once": 8, "length": 64, "every": 2, "learning_rate": 1e-3}
    steps = [
        {
            "method": "curate", "sources": [{"text": str(folder / "corpus.jsonl"), "licence": "CC0-1.0"}], "held_out": 0.1, "shards": 1,
            "decontaminate": [str(folder / "exam.txt")],
        },
        {"method": "tokenize", "vocabulary": 420},
        {"method": "pretrain", "model": MODEL, "context": 64, "steps": 6, "batch": 4, "at_once": 4, "every": 2, "held_out_rows": 2},
        {"method": "grow", "groups": 2},
        {"method": "sft", "examples": 64, "epochs": 1, "measure": 3, **small},
        {"method": "dpo", "examples": 40, **small},
        {"method": "grpo", "examples": 32, "reward": "near", "steps": 2, "answers": 4, "longest": 8, **small | {"every": 1}},
        {"method": "evaluate", "text": [str(folder / "exam.txt")], "windows": 2, "length": 32, "prompts": ["the"], "latency": False},
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
    assert json.loads((out / "manifest.json").read_text())["files"]["stages/02-pretrain/manifest.json"]


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


@pytest.mark.parametrize("stage", ["02-pretrain", "05-dpo"])
def test_killed_it_ends_with_the_same_bytes(stage, recipe, whole, tmp_path):
    """Killed as soon as a stage has its first checkpoint; the stages before it are taken from the whole run."""
    out = tmp_path / "out"
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
    with pytest.raises(Problem, match=r"stages\[2\]\.steps: 6 -> 7"):
        api.train(recipe, whole[0], overrides=["pretrain.steps=7"])


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
