"""Rotation: matrices that are orthogonal, models that say the same in another basis, and those that cannot."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import duramen
import tiny
from duramen.calibrate.walker import Walk
from duramen.problem import Problem
from duramen.quantize.rotate import hadamard, orthogonal
from duramen.registry import get_method
from test_quantize import recipe
from test_rounding import rounded


@pytest.mark.parametrize("width", [1, 2, 4, 8, 12, 20, 24, 32, 64, 80, 576, 640, 896])
def test_hadamard_matrices(width):
    found = hadamard(width)
    assert set(found.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(found @ found.T, width * torch.eye(width, dtype=torch.float64))


def test_where_none_is_known_a_random_matrix_is_orthogonal():
    for width in (6, 15, 92):
        assert width == 92 or hadamard(width) is None
        found = orthogonal(width, 3)
        torch.testing.assert_close(found @ found.T, torch.eye(width, dtype=torch.float64))
        assert not torch.equal(found, orthogonal(width, 4))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma"])
@torch.no_grad()
def test_a_rotated_model_says_the_same(name):
    """Biases (qwen2), norms of q and k (qwen3), fused projections (phi3), gains counted from one and scaled embeddings (gemma)."""
    network, tokens = tiny.model(name), tiny.ids(2, 20)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    dense, before = network(tokens).logits, {key: tensor.clone() for key, tensor in network.state_dict().items()}
    assert get_method("rotate").apply(network, tokens) == []
    torch.testing.assert_close(network(tokens).logits, dense, rtol=1e-3, atol=1e-3 * float(dense.abs().max()))
    changed = [key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])]
    assert any("embed" in key for key in changed)
    assert any(key.endswith("down_proj.weight") for key in changed)
    assert network.get_output_embeddings().weight is not network.get_input_embeddings().weight


def test_outliers_are_spread(tmp_path):
    """One channel of the stream towers; four bits of inputs then cost much, and after rotation little."""
    tokens, moved = tiny.ids(2, 24), []
    for turn in (False, True):
        network = tiny.model("llama")
        network.model.embed_tokens.weight.data[:, 5] *= 30
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
        with torch.no_grad():
            dense = network(tokens).logits
            if turn:
                get_method("rotate").apply(network, tokens)
            moved.append(float((rounded(network, "A4")(tokens).logits - dense).square().mean()))
    assert moved[1] < 0.7 * moved[0]


def test_a_run_unties_saves_and_goes_on(llama, texts, tmp_path, stop_once):
    steps = [{"method": "rotate"}, {"method": "gptq", "format": "W4A4 g8"}]
    found = duramen.run(recipe(texts, *steps), str(llama), tmp_path / "out")
    assert found["steps"][0]["reopened"]["largest_difference"] < 1e-4 * found["steps"][0]["reopened"]["largest_logit"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    stored = {key: tensor for file in (tmp_path / "out").glob("model*.safetensors") for key, tensor in load_file(file).items()}
    assert (stored["model.norm.weight"] == 1).all()
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert "another basis" in (tmp_path / "out" / "report.html").read_text()
    duramen.run(recipe(texts, steps[0]), str(llama), tmp_path / "turned")
    tokens = tiny.ids()
    with torch.no_grad():
        dense, turned = (AutoModelForCausalLM.from_pretrained(place)(tokens).logits for place in (llama, tmp_path / "turned"))
    torch.testing.assert_close(turned, dense, rtol=1e-3, atol=1e-4)
    stop_once()
    with pytest.raises(KeyboardInterrupt):
        duramen.run(recipe(texts, steps[0]), str(llama), tmp_path / "again")
    duramen.run(recipe(texts, steps[0]), str(llama), tmp_path / "again")
    for file in (tmp_path / "turned").glob("model*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_what_cannot_be_rotated_is_said(llama, texts):
    tokens = tiny.ids(2, 20)
    assert duramen.plan(recipe(texts, {"method": "rotate"}), str(llama))["steps"][0]["note"]
    for name in ("gpt2", "gemma2", "opt", "mamba", "bloom"):
        with pytest.raises(Problem, match="cannot be rotated"):
            get_method("rotate").apply(tiny.model(name), tokens)
    network = tiny.model("llama")
    network.model.layers[1].mlp.down_proj.weight.data[:, ::2] = 0
    with pytest.raises(Problem, match="would fill the removed weights"):
        get_method("rotate").apply(network, tokens, walk=Walk())
