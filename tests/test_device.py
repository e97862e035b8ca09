"""Every method on a GPU: on a pretended one, where the bits must be the same; on a real one, where there is one, up to rounding."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import duramen
import tiny
from duramen import engine
from duramen.hardware import machine
from duramen.vision import opening, story, supernet
from pretend import CPU, DEVICE, OnDevice, Places
from test_story import write_recipe
from test_supernet import RECIPE as NETWORKS
from test_token_step import recipe as token_recipe
from test_token_step import step as token_step

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
    "smooth, rotate, rtn": [{}, {}, {"format": "W8 row"}],
    "rotate, gptq, qat": [{}, {"format": "W4A4 row"}, {"steps": 2, "batch": 2}],
    "rora": [TRAINED | {"mode": "side", "dora": True}],
}


@pytest.fixture
def gpu(monkeypatch):
    """A device, and the context in which it works."""
    if REAL:
        return nullcontext()
    monkeypatch.setattr(engine, "fastest_device", lambda: DEVICE)
    monkeypatch.setattr(engine, "free_memory", lambda device: 2**40)
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
    monkeypatch.setattr(engine, "fastest_device", lambda: CPU)
    monkeypatch.setattr(machine, "_has_native_bfloat16", lambda: True)  # as the other device has it, so that both round alike
    here = duramen.run(recipe, str(llama), tmp_path / "here")
    if not REAL or "best" not in name:  # among random weights rounding decides which mask a search ends with
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
    monkeypatch.setattr(engine, "fastest_device", lambda: CPU)
    duramen.run(recipe, str(folder), tmp_path / "here")
    assert REAL or tensors_of(tmp_path / "there") == tensors_of(tmp_path / "here")


@pytest.mark.skipif(not REAL, reason="scans take long on a pretended GPU")
def test_tokens_leave_on_either_device(gpu, texts, tmp_path, monkeypatch):
    folder = tiny.save("mamba2", tmp_path / "model")
    with gpu:
        there = duramen.run(token_recipe(texts, token_step(choose=False, sites=[0])), str(folder), tmp_path / "there")
    monkeypatch.setattr(engine, "fastest_device", lambda: CPU)
    here = duramen.run(token_recipe(texts, token_step(choose=False, sites=[0])), str(folder), tmp_path / "here")
    assert similar(there["evaluations"][0]["perplexity"], here["evaluations"][0]["perplexity"])


def test_networks_of_images_are_trained_and_searched_on_either_device(gpu, tmp_path, monkeypatch):
    if not REAL:
        for module in (opening, story, supernet):
            monkeypatch.setattr(module, "fastest_device", lambda: DEVICE)
        saved = PreTrainedModel.save_pretrained
        monkeypatch.setattr(
            PreTrainedModel, "save_pretrained", lambda network, place: saved(network.to(CPU), place) or network.to(DEVICE)
        )
    with gpu:
        duramen.run(NETWORKS, "new", tmp_path / "found")


@pytest.mark.skipif(not REAL, reason="scans take long on a pretended GPU")
def test_patches_leave_on_a_gpu(tmp_path):
    steps = [
        {"method": "train_images", "steps": 1, "every": 1, "batch": 8, "at_once": 8},
        {"method": "patch_pruning", "keep": [0.5], "sites": [1], "choose": False, "images": 8},
        {"method": "evaluate_images", "batches": [1]},
    ]
    duramen.run(NETWORKS | {"steps": steps}, "new", tmp_path / "pruned")


@pytest.mark.parametrize("kind", ["svd", "animatediff", "decoder", "wan"])
@torch.no_grad()
def test_videos_in_slices_on_either_device(kind, gpu):
    test_video = pytest.importorskip("test_video")
    network, run, given = (test_video.KINDS | {"wan": test_video.wan})[kind]()
    device = torch.device("cuda", 0) if REAL else DEVICE
    with gpu:
        network.to(device)
        there = [each.to(device) for each in given]
        expected = run(network, *there).cpu()
        handle = test_video.streamline(network, piece=40000, donate=REAL)  # a pretended one has no memory to give back
        found = run(network, *there).cpu()
        handle.remove()
    assert test_video.apart(found, expected) < 1e-12


def similar(one, other):
    """Equal figures, at every depth; up to rounding where they come from two machines."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(similar(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return one == pytest.approx(other, rel=0.05 if REAL else 1e-12, abs=1e-3 if REAL else 0)
    return one == other
