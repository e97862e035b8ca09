"""Two processes under torchrun give the model that one gives; activations on disk change nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import duramen
import tiny
from duramen.calibrate.activations import Activations, Budget
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.prune import multiweight
from test_story import write_recipe

STEP = {"method": "multiweight", "sparsity": 0.5, "damping": "held-out", "dense_target": 0.5}
CUT = {"method": "fusion", "ratio": 0.1, "round_to": 1, "gradient_sequences": 9, "gradient_length": 16}


def test_two_ranks_give_the_model_of_one(llama, texts, tmp_path):
    calibration = {"text": [str(texts[0])], "sequences": 40, "length": 48}
    recipe = write_recipe(tmp_path / "r.yaml", texts, steps=(STEP, CUT), calibration=calibration)
    one = duramen.run(recipe, str(llama), tmp_path / "one")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "duramen"]
    words = ["run", recipe, str(llama), str(tmp_path / "two")]
    subprocess.run([*line, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert [record["layer"] for record in two["steps"][0]["layers"]] == [
        record["layer"] for record in one["steps"][0]["layers"]
    ]
    assert all(record["tokens"] == 40 * 48 for step in two["steps"] for record in step["layers"])
    kept = [json.loads((tmp_path / name / "pruning_plan.json").read_text())["kept"] for name in ("one", "two")]
    assert kept[0] == kept[1]
    assert len(two["evaluations"]) == 1
    masks = [load_file(tmp_path / name / "masks.safetensors") for name in ("one", "two")]
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    for file in (tmp_path / "one").glob("model*.safetensors"):
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(tensor, load_file(tmp_path / "two" / file.name)[name], rtol=1e-5, atol=1e-6)


def test_two_ranks_train_the_adapters_of_one(llama, texts, tmp_path):
    calibration = {"text": [str(texts[0])], "sequences": 24, "length": 32}
    train = {"method": "rora", "steps": 8, "batch": 5, "every": 4, "rank": 4, "learning_rate": 0.005}
    steps = ({"method": "magnitude", "sparsity": 0.5}, {"method": "refit", "damping": 0.01}, train)
    recipe = write_recipe(tmp_path / "r.yaml", texts, steps=steps, calibration=calibration)
    one = duramen.run(recipe, str(llama), tmp_path / "one")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "duramen"]
    words = ["run", recipe, str(llama), str(tmp_path / "two")]
    subprocess.run([*line, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    mine, theirs = (found["steps"][2]["training"] for found in (one, two))
    assert theirs["losses"] == pytest.approx(mine["losses"], rel=1e-4)
    assert theirs["best"] == mine["best"]
    for file in (tmp_path / "one").glob("model*.safetensors"):
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(tensor, load_file(tmp_path / "two" / file.name)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_activations_on_disk_change_nothing(llama, tmp_path, alpha):
    tokens, weights, records = tiny.ids(12, 20), [], []
    for memory in (2**30, 20_000, 0):
        model = BlockModel.from_module(tiny.model("llama"))
        walk = Walk(batch_size=4, activation_memory=memory, scratch=tmp_path)
        records.append(multiweight.apply(model, tokens, walk=walk, sparsity=0.5, damping=0.01, dense_target=alpha))
        weights.append(model.network.state_dict())
        assert not list(tmp_path.iterdir()), "nothing is left behind"
    for other in weights[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights[0].items())


def test_the_budget_decides_what_stays_in_memory(tmp_path):
    tensors = [torch.full((1, 4, 8), float(value)) for value in range(4)]
    held = Activations(iter(tensors), Budget(300), tmp_path / "spilled")
    assert len(list((tmp_path / "spilled").iterdir())) == 2, "two of 128 bytes fit in 300"
    held[0], held[3] = tensors[3], tensors[0]
    assert [float(held[batch].mean()) for batch in range(len(held))] == [3, 1, 2, 0]
    assert len(list((tmp_path / "spilled").iterdir())) == 2
