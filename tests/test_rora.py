"""RoRA on whole models: sparse stays sparse, merged is unmerged, runs go on, teachers help, bad input is refused."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import duramen
import tiny
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.recover.peft_io import delta, read_peft
from duramen.recover.rora import Settings, adapted
from duramen.registry import get_method
from duramen.rundir import FORMATS, read_codes
from duramen.train.data import Rows
from duramen.train.models import Course
from duramen.train.objective import NextTokens

QUICK = {"steps": 12, "batch": 4, "every": 4, "rank": 4, "learning_rate": 0.01}


def pruned(name, **settings):
    network = tiny.model(name)
    get_method("magnitude").apply(network, tiny.ids(4, 16), **(settings or {"sparsity": 0.5}))
    return network


@torch.no_grad()
def divergence(model, dense, tokens):
    p, q = (network(tokens).logits.log_softmax(-1) for network in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mamba", "jamba"])
@pytest.mark.parametrize("mode", ["auto", "spp"])
def test_a_pruned_model_is_recovered_and_stays_sparse(name, mode):
    network, dense, tokens, walk = pruned(name), tiny.model(name), tiny.ids(24, 24), Walk()
    zeros = {key: value == 0 for key, value in network.state_dict().items()}
    before = divergence(network, dense, tokens)
    records = get_method("rora").apply(
        network, tokens, walk=walk, dense=dense, distill_weight=1.0, mode=mode, **QUICK | {"steps": 24, "learning_rate": 0.002}
    )
    assert divergence(network, dense, tokens) < before
    (_, first), *_ = walk.training["held_out"]
    assert min(loss for _, loss in walk.training["held_out"]) < first
    for record in records:
        if mode == "spp" or record["mode"] == "masked":
            weight = network.state_dict()[f"{record['layer']}.weight"]
            assert (weight[zeros[f"{record['layer']}.weight"]] == 0).all()
    assert {record["mode"] for record in records} <= {"spp"} if mode == "spp" else {"masked", "side"}
    assert not any(type(module).__name__ == "Adapter" for module in network.modules())


def test_merged_is_what_was_trained():
    network, tokens = pruned("llama", pattern="2:4"), tiny.ids(8, 24)
    model, chosen = BlockModel.from_module(network), Settings(**QUICK)
    with adapted(network, model, chosen) as adapters, torch.no_grad():
        for adapter in adapters.values():
            adapter.b.normal_(std=0.05)
        unmerged = network(tokens).logits
        weights = {name: adapter.merged() for name, adapter in adapters.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            network.get_submodule(name).weight.copy_(weight)
        torch.testing.assert_close(network(tokens).logits, unmerged, rtol=1e-4, atol=1e-4)
    assert all(((weight != 0).reshape(len(weight), -1, 4).sum(2) <= 2).all() for weight in weights.values())


def test_the_mask_beside_a_model_counts_however_few_it_removed(tmp_path):
    recipe, folder = recipe_of(tmp_path, learning_rate=0.003)
    steps = json.loads(recipe.read_text())
    steps["steps"][0] = {"method": "magnitude", "sparsity": 0.04}
    duramen.run(steps, str(folder), tmp_path / "out")
    found = duramen.inspect(str(tmp_path / "out"))["masks"]
    assert found["broken"] == []
    assert found["removed"] > 0.03 * found["size"]
    layers = json.loads((tmp_path / "out" / "results.json").read_text())["steps"][1]
    assert {layer["mode"] for layer in layers["layers"]} == {"masked"}
    trained = (
        sum(4 * (rows + columns) for rows, columns in [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)])
        * 3
    )
    assert layers["training"]["trained_parameters"] == trained


def test_the_loss_of_a_sequence_does_not_depend_on_its_batch():
    network, tokens = tiny.model("llama"), tiny.ids(6, 24)
    rows = Rows.whole(tokens)
    text = NextTokens(Course(network, tiny.model("qwen2"), rows, rows), at_once=2)
    with torch.no_grad():
        together = float(text.loss(range(6)))
        assert together == pytest.approx(sum(float(text.loss([index])) for index in range(6)), rel=1e-5)
        assert text.held_out()["loss"] == pytest.approx(together / sum(map(text.targets, range(6))), rel=1e-5)
        alone = NextTokens(Course(network, None, rows, rows))
        expected = torch.nn.functional.cross_entropy(network(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert alone.held_out()["loss"] == pytest.approx(float(expected), rel=1e-5)


def recipe_of(tmp_path, **more):
    text = tmp_path / "prose.txt"
    text.write_text(tiny.prose(1, 4000))
    steps = [{"method": "magnitude", "pattern": "2:4"}, {"method": "rora", **QUICK, **more}]
    recipe = {"calibration": {"text": [str(text)], "sequences": 16, "length": 32}, "dtype": "float32", "steps": steps}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    return tmp_path / "recipe.json", tiny.save("llama", tmp_path / "llama")


def test_killed_it_ends_with_the_same_bytes(tmp_path):
    recipe, folder = recipe_of(tmp_path)
    duramen.run(str(recipe), str(folder), tmp_path / "whole")
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    training = results["steps"][1]["training"]
    assert training["distilled"]
    assert training["covered"] == pytest.approx(1, abs=0.05)
    assert [steps for steps, _ in training["held_out"]] == [0, 4, 8, 12]
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "what was trained" in page
    assert "rora: what stays removed" in page
    assert "weights in 21 layers are gone" in page, "layers of two steps count once"
    found = duramen.inspect(str(tmp_path / "whole"))
    assert found["masks"]["broken"] == []
    assert found["masks"]["removed"] * 2 == found["masks"]["size"]
    slow = (
        "import sys, time, duramen; import duramen.train.loop as loop; step = loop._step\n"
        "def wait(*a): time.sleep(0.2); return step(*a)\n"
        "loop._step = wait; duramen.run(*sys.argv[1:])"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", slow, str(recipe), str(folder), str(tmp_path / "out")], stderr=subprocess.DEVNULL
    )
    while worker.poll() is None and not list((tmp_path / "out").glob(".duramen/*/checkpoints/step-*/manifest.json")):
        time.sleep(0.01)
    time.sleep(0.3)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert not (tmp_path / "out" / "manifest.json").is_file()
    again = duramen.run(str(recipe), str(folder), tmp_path / "out")
    assert again["steps"][1]["training"] == training
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_the_automatic_rate_and_scale_are_those_of_the_paper():
    assert Settings().gamma == 4
    assert Settings().rate == pytest.approx(3e-4)
    assert Settings(rank=64).rate == pytest.approx(1.5e-4)
    assert Settings(rank=32, alpha=64.0, scaling="alpha_over_r").rate == pytest.approx(3e-4)
    assert Settings(learning_rate=0.5).rate == 0.5
    assert Settings(mode="spp", alpha=2.0, scaling="constant", rank=64).rate == pytest.approx(4e-3), "SPP's own, at any rank"


def test_bad_input_is_refused(tmp_path):
    network, tokens = pruned("llama"), tiny.ids(16, 24)

    def run(model=network, ids=tokens, **settings):
        get_method("rora").apply(model, ids, **QUICK | settings)

    with pytest.raises(Problem, match="matches no layer"):
        run(only=["expert"])
    with pytest.raises(Problem, match="leave none to set apart"):
        run(ids=tokens[:4])
    with pytest.raises(Problem, match="no dense model to distil from"):
        run(objective="distill")
    with pytest.raises(ValueError, match="rank"):
        run(rank=0)
    with pytest.raises(Problem, match="would fill"):
        run(mode="side")
    with pytest.raises(Problem, match="cannot be trained"):
        run(model=tiny.model("mamba"), only=["dt"])
    run(model=tiny.model("mamba"), only=["blocks:0"], steps=1)
    with pytest.raises(Problem, match="and the rank is 40"):
        run(rank=40)
    assert all(parameter.requires_grad for parameter in network.parameters())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(Problem, match="loss of step"):
        run(learning_rate=math.inf)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(type(module).__name__ == "Adapter" for module in network.modules())


def test_examples_are_learned_and_the_adapters_kept_beside_the_model(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) for n in range(200)))
    folder = tiny.save("llama", tmp_path / "llama")
    text = tmp_path / "prose.txt"
    text.write_text(tiny.prose(1, 4000))
    step = {
        "method": "rora",
        **QUICK,
        "data": str(data),
        "objective": "ce",
        "adapter": "rslora",
        "recompute": True,
        "init": "zero",
    }
    recipe = {"calibration": {"text": [str(text)], "sequences": 16, "length": 32}, "dtype": "float32", "steps": [step]}
    found = duramen.run(recipe, str(folder), tmp_path / "out")
    losses = [loss for _, loss in found["steps"][0]["training"]["held_out"]]
    assert losses[-1] < losses[0]
    changes = read_peft(tmp_path / "out" / "adapter")
    merged, dense = (AutoModelForCausalLM.from_pretrained(place) for place in (tmp_path / "out", folder))
    for name, change in changes.items():
        expected = dense.get_parameter(f"{name}.weight") + delta(change)
        torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), expected, rtol=1e-5, atol=1e-6)
    assert "adapter/adapter_config.json" in json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    with pytest.raises(Problem, match="the mode masked"):
        duramen.run(str(recipe_of(tmp_path, adapter="portable")[0]), str(folder), tmp_path / "refused")
    with pytest.raises(ValueError, match="no meaning in the mode `spp`"):
        Settings(mode="spp", init="pissa")
    with pytest.raises(Problem, match="needs a tokenizer"):
        get_method("rora").apply(tiny.model("llama"), tiny.ids(16, 24), data=str(data), objective="ce", **QUICK)


def test_a_rounded_model_stays_on_its_grid_and_comes_nearer(tmp_path):
    """Pruned, rounded, and trained by adapters: every zero, every step and every format stays, codes move, and what is saved is what was trained."""
    recipe, folder = recipe_of(tmp_path)
    whole = json.loads(recipe.read_text())
    prune, rora = whole["steps"]
    gptq = {"method": "gptq", "format": "W3A8 g8"}
    duramen.run(whole | {"steps": [prune, gptq]}, str(folder), tmp_path / "before")
    rora |= {"steps": 24, "learning_rate": 0.02, "distill_weight": 1.0}
    found = duramen.run(whole | {"steps": [prune, gptq, rora]}, str(folder), tmp_path / "after")
    training = found["steps"][2]["training"]
    assert min(loss for _, loss in training["held_out"]) < 0.97 * training["held_out"][0][1]
    assert {layer["mode"] for layer in found["steps"][2]["layers"]} == {"grid"}
    before, after = read_codes(tmp_path / "before"), read_codes(tmp_path / "after")
    assert (tmp_path / "before" / FORMATS).read_bytes() == (tmp_path / "after" / FORMATS).read_bytes()
    assert all(torch.equal(each.steps, after[name].steps) for name, each in before.items())
    assert any(not torch.equal(each.codes, after[name].codes) for name, each in before.items())
    assert all(bool((after[name].codes[each.codes == 0] == 0).float().mean() > 0.5) for name, each in before.items())
    inspected = duramen.inspect(str(tmp_path / "after"))
    assert inspected["codes"]["broken"] == inspected["masks"]["broken"] == []
    for wrong, words in (({"dora": True}, "cannot be trained on a grid"), ({"mode": "side"}, "cannot follow `gptq`")):
        with pytest.raises(Problem, match=words):
            duramen.run(whole | {"steps": [prune, gptq, rora | wrong]}, str(folder), tmp_path / f"no-{words[:5]}")
    with pytest.raises(Problem, match="cannot be trained on a grid"):
        get_method("rora").apply(tiny.model("llama"), tiny.ids(16, 20), mode="grid", **QUICK)
