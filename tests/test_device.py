"""Every method on a GPU: on a pretended one, where the bits must be the same; on a real one, where there is one, up to rounding."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

import duramen
import tiny
from duramen import api
from duramen.hardware import machine
from pretend import CPU, DEVICE, OnDevice, Places
from test_story import write_recipe

REAL = torch.cuda.is_available()
HALF = {"sparsity": 0.5, "damping": 0.01, "only": ["*.1.*"]}
CUT = {"ratio": 0.2, "round_to": 1, "minimum": 2}
FUSED = CUT | {"gradient_sequences": 4, "gradient_length": 16}
TARGET = {"target": {"block_parameters": 0.7}}
MASKS = {"epochs": 2, "population": 6, "mutants": 3, "crossovers": 2, "parents": 2, "fitness_tokens": 64, "damping": 0.01}
TRAINED = {"steps": 2, "batch": 2, "rank": 4}
METHODS = {
    "magnitude": [{"sparsity": 0.5}],
    "sparsegpt": [HALF],
    "multiweight": [HALF | {"effort": "good"}],
    "multiweight best": [{"effort": "best", "pattern": "2:4", "damping": "held-out", "only": ["*.1.*"]}],
    "flap": [CUT],
    "fusion": [FUSED | {"families": ["ffn_channel", "kv_group"]}],
    "fusion ablation": [FUSED | {"fusion": "ablation"}],
    "fusion search": [FUSED | {"fusion": "search"}],
    "llm_pruner": [FUSED],
    "depth": [{"parts": "block", "count": 1}],
    "search": [TARGET | {"generations": 1}],
    "search_masks": [TARGET | MASKS],
    "wanda, refit": [{"sparsity": 0.5}, {}],
    "magnitude, rora": [{"pattern": "2:4"}, TRAINED],
    "rora": [TRAINED | {"mode": "side", "dora": True}],
}


@pytest.fixture
def gpu(monkeypatch):
    """A device, and the context in which it works."""
    if REAL:
        return nullcontext()
    monkeypatch.setattr(api, "fastest_device", lambda: DEVICE)
    monkeypatch.setattr(api, "free_memory", lambda device: 2**40)
    return Places()


def test_the_pretended_device_refuses_what_a_real_one_refuses():
    with Places():
        here, there = torch.ones(3, 3), torch.ones(3, 3, device=DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        product = there @ here.to(DEVICE)
        assert isinstance(product, OnDevice)
        assert product[torch.tensor([0, 1])].cpu().sum() == 18
        weight = torch.nn.Linear(3, 1).to(DEVICE)
        weight(there).sum().backward()
        assert weight.weight.grad.device == DEVICE


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_model_on_either_device(name, gpu, llama, texts, tmp_path, monkeypatch):
    methods = [part.split()[0] for part in name.split(", ")]
    steps = [{"method": method} | settings for method, settings in zip(methods, METHODS[name], strict=True)]
    measured = {"method": "evaluate", "text": [str(texts[1])], "length": 64, "windows": 2, "latency": False, "new_tokens": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", texts, steps=[*steps, measured], evaluate=False)
    with gpu:
        there = duramen.run(recipe, str(llama), tmp_path / "there")
    monkeypatch.setattr(api, "fastest_device", lambda: CPU)
    monkeypatch.setattr(machine, "_has_native_bfloat16", lambda: True)  # as the other device has it, so that both round alike
    here = duramen.run(recipe, str(llama), tmp_path / "here")
    assert similar(there["evaluations"][0]["perplexity"], here["evaluations"][0]["perplexity"])
    if not REAL:
        assert tensors_of(tmp_path / "there") == tensors_of(tmp_path / "here")


def tensors_of(folder):
    """Every tensor of a model folder, as bytes."""
    files = [load_file(file) for file in folder.glob("model*.safetensors")]
    return {name: tensor.numpy().tobytes() for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma3_text", "mamba", "zamba2"])
def test_every_kind_of_family_runs_on_either_device(name, gpu, texts, tmp_path, monkeypatch):
    folder = tiny.save(name, tmp_path / name)
    recipe = write_recipe(tmp_path / "recipe.yaml", texts, steps=[{"method": "sparsegpt", "sparsity": 0.5}], evaluate=False)
    with gpu:
        duramen.run(recipe, str(folder), tmp_path / "there")
    monkeypatch.setattr(api, "fastest_device", lambda: CPU)
    duramen.run(recipe, str(folder), tmp_path / "here")
    assert REAL or tensors_of(tmp_path / "there") == tensors_of(tmp_path / "here")


def similar(one, other):
    """Equal figures, at every depth; up to rounding where they come from two machines."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(similar(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return one == pytest.approx(other, rel=0.05 if REAL else 1e-12, abs=1e-3 if REAL else 0)
    return one == other
