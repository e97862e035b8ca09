"""The real model and data: the evaluator is right, and multi-weight pruning is nearer to dense than its rivals."""

import json

import numpy as np
import pytest
import torch

import duramen
from duramen.assets import ASSETS, open_model, read_text
from duramen.calibrate.tokens import calibration_tokens, evaluation_tokens
from duramen.evaluate.likelihood import grade, load_requests, score_requests
from duramen.evaluate.perplexity import final_hidden, perplexity, token_losses
from duramen.families.model import BlockModel
from duramen.hardware.machine import forward_dtype
from duramen.registry import get_method

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder():
    return open_model("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [name for name, asset in ASSETS.items() if asset.kind == "text"])
def test_embedded_texts_are_prose(name):
    documents = read_text(name)
    assert len(documents) > 100
    assert len(set(documents)) == len(documents)
    middle = documents[len(documents) // 2]
    assert len(middle) > 200
    assert not any(mark in middle for mark in ("Question:", "Answer:", "Passage:", "Background:"))


@torch.no_grad()
def test_perplexity_of_the_dense_model(folder, tokenizer):
    """20.31 on six windows of 512 of BoolQ passages, measured independently (other passages, same text)."""
    windows = evaluation_tokens(tokenizer, "boolq", length=512, windows=4)
    model = BlockModel.from_folder(folder, dtype=forward_dtype("auto"))
    losses = token_losses(model, final_hidden(model, windows), windows)
    assert 15 < perplexity(losses.mean(1).double().numpy()).value < 26


@torch.no_grad()
def test_accuracies_of_the_dense_model(folder, tokenizer):
    """0.725 on the first 200 documents of SciQ, measured independently: 20 of them must not be far off."""
    model = BlockModel.from_folder(folder, dtype=forward_dtype("auto"))
    requests = load_requests("sciq", tokenizer, 20)
    assert {item.document for item in requests} == set(range(20))
    assert 0.5 < grade(requests, score_requests(model, requests)).acc.mean() < 0.95


@torch.no_grad()
def test_the_order_of_the_methods_on_real_layers(folder, tokenizer):
    """Mean relative error over the layers of two blocks: Wanda > SparseGPT, and ours at most 0.85 of SparseGPT's."""
    tokens = calibration_tokens(tokenizer, ["squad", "coqa"], sequences=8, length=256, seed=0)
    errors = {}
    for name, settings in (("wanda", {}), ("sparsegpt", {"damping": 0.01}), ("multiweight", {"damping": 0.01})):
        model = BlockModel.from_folder(folder, dtype=forward_dtype("auto"))
        records = get_method(name).apply(model, tokens, sparsity=0.6, only=("blocks:0-1",), **settings)
        errors[name] = np.mean([record["relative_error"] for record in records])
        assert all(record["removed"] == round(0.6 * record["size"]) for record in records if name != "wanda")
        assert name != "multiweight" or all(record["excess"] <= 1e-4 for record in records)
    assert errors["wanda"] > errors["sparsegpt"]
    assert errors["multiweight"] < 0.85 * errors["sparsegpt"]


def test_the_quickstart_on_two_blocks(tmp_path):
    """The shipped recipe from the first step to the report, with fewer layers, tokens and documents."""
    overrides = [
        "multiweight.only=[blocks:28-29]", "calibration.sequences=4", "calibration.length=256", "evaluate.length=256",
        "evaluate.windows=2", "evaluate.documents=4", "evaluate.new_tokens=4", "evaluate.latency=false",
    ]  # fmt: skip
    results = duramen.run("quickstart", "smollm2-135m", tmp_path / "out", overrides=overrides)
    layers = results["steps"][0]["layers"]
    assert len(layers) == 14
    assert all(2 * layer["removed"] == layer["size"] for layer in layers)
    found = results["evaluations"][0]["perplexity"]["boolq"]
    assert found["before"]["value"] < found["after"]["value"] < 1.5 * found["before"]["value"]
    assert 0 < found["kl"]["value"] < 0.5
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(name.startswith("model-") for name in manifest["files"]) == 31
    assert duramen.inspect(str(tmp_path / "out"))["masks"]["broken"] == []
