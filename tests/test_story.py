"""The command line end to end on a tiny model: run, resume, read, compare, and every mistake that a user makes."""

import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import duramen
import tiny
from duramen import registry
from duramen.cli import main
from duramen.problem import Problem
from duramen.rundir import unpack_mask

STEP = {"method": "multiweight", "sparsity": 0.5, "damping": "held-out"}


def write_recipe(path, texts, *, steps=(STEP,), evaluate=True, **more):
    measured = {"method": "evaluate", "text": [str(texts[1])], "length": 64, "windows": 4, "prompts": ["ab"], "new_tokens": 4}
    whole = {
        "name": "tiny",
        "dtype": "float32",
        "calibration": {"text": [str(texts[0])], "sequences": 8, "length": 64},
        "steps": [*steps, *([measured] if evaluate else [])],
    }
    path.write_text(yaml.safe_dump(whole | more))
    return str(path)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs one command line in this process: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["duramen", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama, texts):
    """One finished run: (folder, recipe)."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder / "recipe.yaml", texts)
    duramen.run(recipe, str(llama), folder / "out")
    return folder / "out", recipe


def test_the_output_has_every_file_and_the_exact_sparsity(finished):
    out, _ = finished
    names = {item.name for item in out.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "model.safetensors.index.json", "masks.safetensors", "manifest.json"}
    assert names >= {"recipe.yaml", "recipe.lock.yaml", "results.json", "report.html", "log.jsonl", "README.md"}
    tensors = {}
    for file in out.glob("model*.safetensors"):
        tensors |= load_file(file)
    masks = load_file(out / "masks.safetensors")
    assert len(masks) == 21
    for name, packed in masks.items():
        weight = tensors[f"{name}.weight"]
        pruned = unpack_mask(packed, weight.shape[1])
        assert int(pruned.sum()) == weight.numel() // 2
        assert (weight[pruned] == 0).all()
    results = json.loads((out / "results.json").read_text())
    assert results["schema"] == "duramen-results/1"
    assert sum(layer["removed"] for layer in results["steps"][0]["layers"]) == 11520
    events = [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert events.count("layer") == 21
    assert events[-1] == "done"


def test_plain_transformers_opens_it(finished):
    """In a process that never imports Duramen."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T; m = A.from_pretrained(sys.argv[1]);"
        "T.from_pretrained(sys.argv[1]); z = (m.model.layers[1].mlp.up_proj.weight == 0).float().mean().item();"
        "assert 'duramen' not in sys.modules; print(z)"
    )
    done = subprocess.run([sys.executable, "-c", code, finished[0]], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(0.5)


def test_untouched_tensors_are_kept_byte_for_byte(finished, llama):
    before, after = load_file(llama / "model.safetensors"), {}
    for file in finished[0].glob("model*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "proj" not in name:
            assert torch.equal(tensor, after[name]), name


def test_running_again_says_that_all_is_done(finished, command, llama):
    out, recipe = finished
    before = {file: file.stat().st_mtime_ns for file in out.iterdir() if file.name != "log.jsonl"}
    code, _, err = command("run", recipe, llama, out)
    assert code == 0
    assert "already done" in err
    assert before == {file: file.stat().st_mtime_ns for file in out.iterdir() if file.name != "log.jsonl"}


@pytest.mark.parametrize("change", ["recipe", "model", "calibration"])
def test_a_changed_run_is_refused_with_what_differs(finished, command, llama, texts, tmp_path, change):
    out, recipe = finished
    model, words = llama, []
    if change == "recipe":
        words = ["--set", "multiweight.sparsity=0.6"]
    if change == "model":
        model = tiny.save("llama", tmp_path / "model", seed=1)
    if change == "calibration":
        other = tmp_path / "other.txt"
        other.write_text(tiny.prose(7, 3000))
        recipe = write_recipe(tmp_path / "r.yaml", (other, texts[1]))
    code, _, err = command("run", recipe, model, out, *words)
    assert code == 3
    expected = {
        "recipe": "steps[0].sparsity: 0.5 -> 0.6",
        "model": "model.model.safetensors: ",
        "calibration": "calibration tokens: ",
    }
    assert expected[change] in err
    assert (out / "manifest.json").is_file()


def files_of(out):
    return json.loads((out / "manifest.json").read_text())["files"]


def test_killed_three_times_it_ends_with_the_same_bytes(finished, llama, tmp_path):
    out, recipe = finished
    slow = (
        "import sys, time; import duramen; from duramen import api; log = api.RunDirectory.log\n"
        "def wait(*a, **k): log(*a, **k); time.sleep(0.1)\n"
        "api.RunDirectory.log = wait; duramen.run(*sys.argv[1:])"
    )
    again, draw = tmp_path / "out", random.Random(0)
    for _ in range(3):
        worker = subprocess.Popen([sys.executable, "-c", slow, recipe, str(llama), str(again)], stderr=subprocess.DEVNULL)
        log = again / "log.jsonl"
        start = log.read_text().count('"layer"') if log.is_file() else 0
        while worker.poll() is None and (log.read_text().count('"layer"') if log.is_file() else 0) == start:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.8))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert not (again / "manifest.json").is_file(), "the run was killed too late to show anything"
    duramen.run(recipe, str(llama), again)
    assert files_of(again) == files_of(out)


def test_every_reading_command_prints_tables_and_json(finished, command, llama, texts):
    out, recipe = finished
    text = ("--text", texts[1], "--length", 64, "--windows", 3)
    for words in (
        ("plan", recipe, llama),
        ("inspect", out),
        ("evaluate", out, *text),
        ("compare", llama, out, *text, "--no-latency"),
        ("methods",),
        ("methods", "multiweight"),
        ("assets",),
        ("doctor",),
    ):
        code, table, _ = command(*words)
        assert code == 0, words
        assert table.strip()
        code, printed, _ = command(*words, "--json")
        assert code == 0
        assert json.loads(printed)


def test_plan_counts_exactly_what_the_run_removes(finished, command, llama):
    out, recipe = finished
    _, printed, _ = command("plan", recipe, llama, "--json")
    planned = {role["role"]: role["removed"] for role in json.loads(printed)["steps"][0]["roles"]}
    done: dict[str, int] = {}
    for layer in json.loads((out / "results.json").read_text())["steps"][0]["layers"]:
        done[layer["role"]] = done.get(layer["role"], 0) + layer["removed"]
    assert planned == done


def test_inspect_finds_a_broken_mask(finished, command, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns(".duramen"))
    shard = next(
        file for file in folder.glob("model*") if "model.layers.1.mlp.up_proj.weight" in file.read_bytes().decode("latin")
    )
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight"] += 1.0
    save_file(tensors, shard, {"format": "pt"})
    code, printed, _ = command("inspect", folder)
    assert code == 1
    assert "BROKEN in model.layers.1.mlp.up_proj" in printed


def test_report_is_written_anew(finished, command):
    out, _ = finished
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert command("report", out)[0] == 0
    assert (out / "report.html").read_text() == before


def test_steps_follow_one_another(llama, texts, tmp_path):
    """Magnitude on the attention, then ours on the MLP: both masks are in the result."""
    steps = ({"method": "magnitude", "sparsity": 0.25, "only": ["q", "k", "v", "o"]}, STEP | {"only": ["gate", "up", "down"]})
    recipe = write_recipe(tmp_path / "r.yaml", texts, steps=steps, evaluate=False)
    results = duramen.run(recipe, str(llama), tmp_path / "out")
    assert [len(step["layers"]) for step in results["steps"]] == [12, 9]
    assert len(load_file(tmp_path / "out" / "masks.safetensors")) == 21


def test_a_mistake_in_a_later_step_costs_nothing(llama, texts, tmp_path, monkeypatch):
    """The corrected recipe goes on in the same folder behind what is finished, and ends as if it had been right at once."""
    good, other = ({"method": "rtn", "format": f"W4 g{size}"} for size in (8, 16))
    export = {"method": "export", "id": "first", "form": "compressed"}
    out, seen = tmp_path / "out", []

    def run(*steps, where=out):
        seen.clear()
        recipe = write_recipe(tmp_path / "r.yaml", texts, steps=steps, evaluate=False)
        return duramen.run(recipe, str(llama), where, progress=lambda event, fields: seen.append((event, fields)))

    with monkeypatch.context() as stopped:
        stopped.setattr("duramen.quantize.rtn.quantize_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(STEP, other, export)

    def blocks():
        return {file: file.stat().st_mtime_ns for file in (out / ".duramen" / "step-00-multiweight").glob("block-*")}

    assert (before := blocks())
    with pytest.raises(Problem, match=r"holds another run; it differs in:\n    steps\[0\]\.sparsity: 0\.5 -> 0\.6"):
        run(STEP | {"sparsity": 0.6}, good)
    with pytest.raises(Problem, match="There is no method"):
        run(STEP, {"method": "rtm"})
    (out / ".duramen" / "step-01-rtn" / "begun").mkdir(parents=True)
    (out / "exports").mkdir()
    (out / "exports" / "first").mkdir()
    run(STEP, good, export | {"id": "second"})
    changes = next(fields["steps"] for event, fields in seen if event == "changed")
    assert 'steps[1].format: "W4 g16" -> "W4 g8"' in changes
    assert blocks() == before, "the first step was kept"
    assert (out / ".duramen" / "aside" / "step-01-rtn-0" / "begun").is_dir()
    assert [file.name for file in (out / "exports").iterdir()] == ["second"]
    with pytest.raises(Problem, match=r"holds another run; it differs in:\n    steps\[1\]\.format"):
        run(STEP, other, export | {"id": "second"})
    run(STEP, good, export | {"id": "second"}, where=tmp_path / "at once")
    assert files_of(out) == files_of(tmp_path / "at once")


def test_a_method_of_another_package(llama, texts, tmp_path, monkeypatch, command):
    entries = [importlib.metadata.EntryPoint("thin", "foreign", "duramen.methods")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries if group == "duramen.methods" else [])
    registry.method_modules.cache_clear()
    recipe = write_recipe(tmp_path / "r.yaml", texts, steps=({"method": "thin", "share": 0.25},))
    assert "which is not foretold" in command("plan", recipe, llama)[1]
    assert "That goes" in command("methods", "thin")[1]
    found = duramen.run(recipe, str(llama), tmp_path / "out")["steps"][0]
    assert {layer["removed"] / layer["size"] for layer in found["layers"]} == {0.25}
    monkeypatch.undo()
    registry.method_modules.cache_clear()


def test_what_a_later_step_refuses_is_said_before_an_earlier_one_computes(llama, texts, tmp_path):
    for step, words in (
        ({"method": "rtn", "format": "W4 g7"}, "Groups of 7 do not divide"),
        ({"method": "rora", "rank": 1000}, "the rank is 1000"),
        ({"method": "wanda", "sparsity": 0.5, "only": ["blocks:7-9"]}, "blocks:7-9"),
    ):
        recipe = write_recipe(tmp_path / "r.yaml", texts, steps=(STEP, step))
        with pytest.raises(Problem, match=words):
            duramen.run(recipe, str(llama), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom", "phi3", "opt", "qwen3", "gemma2", *tiny.MAMBA])
def test_every_family_runs_and_reopens(name, texts, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", texts, steps=({"method": "multiweight", "pattern": "2:4"},), evaluate=False)
    results = duramen.run(recipe, str(tiny.save(name, tmp_path / "model")), tmp_path / "out")
    assert results["steps"][0]["reopened"]["largest_difference"] < 1e-3 * results["steps"][0]["reopened"]["largest_logit"]
    assert duramen.inspect(str(tmp_path / "out"))["masks"]["broken"] == []
    assert all(role["share"] == 0.5 for role in duramen.inspect(str(tmp_path / "out"))["roles"])


def test_sparsity_zero_changes_nothing(llama, texts, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", texts, steps=(STEP | {"sparsity": 0.0},), evaluate=False)
    duramen.run(recipe, str(llama), tmp_path / "out")
    after = {}
    for file in (tmp_path / "out").glob("model*.safetensors"):
        after |= load_file(file)
    for name, tensor in load_file(llama / "model.safetensors").items():
        assert torch.equal(tensor, after[name]), name


def damaged(folder, kind):
    """A copy of the model with one thing wrong."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "nan":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
        save_file(tensors, weights, {"format": "pt"})
    elif kind == "quantized":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    elif kind == "architecture":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "seed_oss"}))
    elif kind == "config":
        config.unlink()
    elif kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("truncated", 2, "model.safetensors is damaged"),
        ("nan", 1, "model.layers.1.mlp.down_proj.weight holds 1 NaN"),
        ("quantized", 3, "quantized already (gptq)"),
        ("architecture", 3, "--allow-generic"),
        ("config", 2, "has no config.json"),
        ("pickle", 2, "stored as a pickle"),
    ],
)
def test_damaged_models(command, llama, texts, tmp_path, kind, code, words):
    model = damaged(shutil.copytree(llama, tmp_path / "model"), kind)
    recipe = write_recipe(tmp_path / "r.yaml", texts)
    found, _, err = command("run", recipe, model, tmp_path / "out")
    assert found == code
    for part in ("error: ", "\n  why: ", "\n  try: ", words):
        assert part in err
    if kind == "nan":
        kept = sorted(file.name for file in (tmp_path / "out/.duramen/step-00-multiweight").glob("block-*.json"))
        assert kept == ["block-0000.json"], "the block before the damaged one is kept"


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["--set", "multiweight.sparsty=0.5"], 2, "did you mean `sparsity`?"),
        (["--set", "multiweight.sparsity=1.2"], 2, "below 1, got 1.2"),
        (["--set", "multiweight.sparsity=null", "--set", "multiweight.pattern=4:2"], 2, "'4:2'"),
        (["--set", "multiweight.only=[gates]"], 2, "The filter gates matches no layer"),
        (["--set", "calibration.length=100000"], 2, "tokens, but 8 windows of 100000"),
        (["--set", "evaluate.length=100000"], 2, "tokens, but 4 windows of 100000"),
        (["--set", "calibration.text=[nowhere.txt]"], 2, "no embedded text `nowhere.txt`"),
    ],
)
def test_mistakes_in_the_line(command, llama, texts, tmp_path, words, code, what):
    found, _, err = command("run", write_recipe(tmp_path / "r.yaml", texts), llama, tmp_path / "out", *words)
    assert found == code
    for part in (what, "\n  why: ", "\n  try: "):
        assert part in err


def test_a_folder_that_cannot_be_written(command, llama, texts, tmp_path):
    code, _, err = command("run", write_recipe(tmp_path / "r.yaml", texts), llama, "/proc/duramen")
    assert code == 2
    assert "cannot be written" in err
    assert "choose another OUT folder" in err


def test_a_disk_that_fills_up_loses_nothing(command, llama, texts, tmp_path, monkeypatch):
    """The third block does not fit; with space again the run goes on and ends with the same bytes."""
    recipe, real = write_recipe(tmp_path / "r.yaml", texts, evaluate=False), os.fsync

    def full_at_block_two(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == ".block-0002.safetensors.partial":
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_block_two)
    code, _, err = command("run", recipe, llama, tmp_path / "out")
    assert code == 4
    assert "the disk is full" in err
    monkeypatch.setattr(os, "fsync", real)
    assert command("run", recipe, llama, tmp_path / "out")[0] == 0
    assert command("run", recipe, llama, tmp_path / "whole")[0] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_calibration_text_is_never_evaluation_text(command, llama, texts, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", (texts[0], texts[0]))
    code, _, err = command("run", recipe, llama, tmp_path / "out")
    assert code == 2
    assert "both calibration and evaluation text" in err


def test_an_unknown_architecture_runs_when_it_may_be_guessed(command, llama, texts, tmp_path):
    model = damaged(shutil.copytree(llama, tmp_path / "model"), "architecture")
    recipe = write_recipe(tmp_path / "r.yaml", texts, evaluate=False)
    assert command("run", recipe, model, tmp_path / "out", "--allow-generic")[0] == 0
    code, printed, _ = command("inspect", tmp_path / "out", "--allow-generic")
    assert code == 0
    assert "family generic" in printed


def test_help_needs_no_torch():
    code = "import sys; import duramen.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_there_is_no_such_model(command):
    code, _, err = command("inspect", "no/such-model")
    assert code == 2
    assert "There is no model `no/such-model`" in err
    assert "smollm2-135m" in err
