"""Smoothing: a model says the same, its inputs are levelled, what is removed stays so, and the rest is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import duramen
import tiny
from duramen.families.model import BlockModel
from duramen.grids import parse_format
from duramen.problem import Problem
from duramen.quantize.smooth import smoothing_scales
from duramen.registry import get_method
from duramen.rounding import start_rounding
from test_quantize import recipe


def test_scales_are_those_of_the_paper():
    largest, weights = torch.tensor([4.0, 1.0, 0.0, 9.0]), [torch.tensor([[1.0, -4.0, 1.0, 0.0], [0.25, 1.0, 1.0, 0.0]])]
    torch.testing.assert_close(smoothing_scales(largest, weights, 0.5), torch.tensor([2.0, 0.5, 1.0, 1.0]).double())
    torch.testing.assert_close(smoothing_scales(largest, weights, 1.0), torch.tensor([4.0, 1.0, 1.0, 1.0]).double())


@pytest.mark.parametrize("name", sorted(set(tiny.CONFIGS) - {"mamba", "falcon_mamba", "mamba2"}))
@torch.no_grad()
def test_a_smoothed_model_says_the_same(name):
    """Norms with biases and gains counted from one, heads in groups, two norms per layer, experts, parallel branches, hybrids."""
    network, tokens = tiny.model(name), tiny.ids(2, 20)
    dense, before = network(tokens).logits, {key: tensor.clone() for key, tensor in network.state_dict().items()}
    assert get_method("smooth").apply(network, tokens) == []
    torch.testing.assert_close(network(tokens).logits, dense, rtol=1e-3, atol=1e-3 * float(dense.abs().max()))
    changed = {key.split(".", 3)[-1] for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
    assert len(changed) >= 3, changed


def test_inputs_are_levelled_and_zeros_stay():
    """One channel of everything that is smoothed towers."""
    tokens, moved = tiny.ids(2, 24), []
    for smoothed in (False, True):
        network = tiny.model("llama")
        for layer in network.model.layers:
            layer.input_layernorm.weight.data[3] *= 40
            layer.mlp.up_proj.weight.data[7] *= 40
            layer.mlp.down_proj.weight.data[::2, 7] = 0
        with torch.no_grad():
            dense = network(tokens).logits
            if smoothed:
                get_method("smooth").apply(network, tokens)
                assert not network.model.layers[1].mlp.down_proj.weight[::2, 7].any()
            start_rounding(network, dict.fromkeys(BlockModel.from_module(network).layer_names(), parse_format("A5")))
            moved.append(float((network(tokens).logits - dense).square().mean()))
    assert moved[1] < 0.5 * moved[0]


def test_only_what_was_chosen_is_smoothed():
    network, tokens = tiny.model("llama"), tiny.ids(2, 20)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    get_method("smooth").apply(network, tokens, only=["down", "q"])
    changed = {key.split(".", 3)[-1] for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {"mlp.up_proj.weight", "mlp.down_proj.weight"}, "k and v read what q reads"
    for only in (["q"], ["k"]):
        with pytest.raises(Problem, match="cannot be smoothed"):
            get_method("smooth").apply(network, tokens, only=only)
    with pytest.raises(Problem, match="cannot be smoothed"):
        get_method("smooth").apply(tiny.model("phi3"), tokens, only=["down"])


def test_a_run_saves_reopens_and_goes_on(texts, tmp_path, stop_once):
    tiny.save("gpt2", tmp_path / "model")
    steps = [{"method": "smooth"}, {"method": "gptq", "format": "W4A8 g8"}]
    found = duramen.run(recipe(texts, *steps), str(tmp_path / "model"), tmp_path / "out")
    assert found["steps"][0]["reopened"]["largest_difference"] < 1e-4 * found["steps"][0]["reopened"]["largest_logit"]
    assert "times the median" in (tmp_path / "out" / "report.html").read_text()
    duramen.run(recipe(texts, steps[0]), str(tmp_path / "model"), tmp_path / "once")
    tokens = tiny.ids()
    with torch.no_grad():
        dense, smoothed = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits for name in ("model", "once"))
    torch.testing.assert_close(smoothed, dense, rtol=1e-3, atol=1e-4)
    stop_once()
    with pytest.raises(KeyboardInterrupt):
        duramen.run(recipe(texts, steps[0]), str(tmp_path / "model"), tmp_path / "again")
    duramen.run(recipe(texts, steps[0]), str(tmp_path / "model"), tmp_path / "again")
    for file in (tmp_path / "once").glob("model*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
