"""Networks that round as they run: what a token gives depends on it alone, decoding equals the whole pass, and folders open as they were measured."""

import inspect
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import duramen
import tiny
from duramen.families.model import BlockModel
from duramen.grids import Cache, Inputs, parse_format
from duramen.opening import open_blocks
from duramen.problem import Problem
from duramen.quantize.model import formats_of
from duramen.rounding import input_steps, round_cache, round_inputs, start_rounding
from duramen.rundir import FORMATS
from test_quantize import recipe

FAMILIES = ("llama", "gpt2", "opt", "gpt_neox", "phi3", "gemma3_text", "zamba2")


def rounded(network, text):
    """The network, rounding everywhere what the format says."""
    blocks = BlockModel.from_module(network)
    start_rounding(network, formats_of(blocks, list(blocks.layer_names()), parse_format(text)))
    return network


def test_formats_read_as_they_are_written():
    for text in (
        "W4A8KV8 g64",
        "W3 row",
        "A8",
        "A4g32",
        "KV4 sinks4",
        "W4A4g32KV4 g32 affine sinks2",
        "A8KV8",
        "W8 tensor narrow",
    ):
        assert parse_format(text).text == text
    assert parse_format("W4A8").text == "W4A8 row"
    for text in ("A1", "KV9", "W4 sinks4", "A8 g32", "KV8 affine", "W4KV4 narrow affine", "A8W4", "g32", "W4A8g0", ""):
        with pytest.raises(Problem, match="is no format"):
            parse_format(text)


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.sampled_from([None, 4]))
def test_inputs_go_to_the_nearest_point_and_stay_there(seed, bits, group):
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10 ** (seed % 7 - 3)
    inputs = Inputs(bits, group)
    once, steps = round_inputs(x, inputs), input_steps(x, inputs).repeat_interleave(group or 8, -1)
    assert ((once - x).abs() <= steps / 2 * (1 + 1e-9)).all()
    torch.testing.assert_close(round_inputs(once, inputs), once, rtol=1e-12, atol=0)
    assert torch.equal(round_inputs(x[1:2, 2:3], inputs), once[1:2, 2:3])
    assert (round_inputs(torch.zeros(2, 8), inputs) == 0).all()


@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.integers(0, 3))
def test_keys_and_values_stay_once_rounded_and_sinks_are_left(seed, bits, sinks):
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + seed % 5 - 2
    once = round_cache(x, Cache(bits), sinks=sinks)
    assert torch.equal(once[:, :, :sinks], x[:, :, :sinks])
    torch.testing.assert_close(round_cache(once, Cache(bits), sinks=sinks), once, rtol=1e-9, atol=1e-12)
    span = x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0)
    assert ((once - x).abs().amax(-1) <= span / (2**bits - 1) * 0.5 * (1 + 1e-9) + 1e-12)[:, :, sinks:].all()
    assert (round_cache(torch.zeros(1, 1, 2, 4), Cache(bits), sinks=0) == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_decoding_from_a_cache_is_the_whole_pass(name):
    """In float64, so that no rounding falls the other way by chance; and what is rounded is really another model."""
    network, tokens = tiny.model(name).double(), tiny.ids(2, 24)
    dense = network(tokens, use_cache=False).logits
    rounded(network, "A4KV3 sinks2")
    whole = network(tokens, use_cache=False).logits
    first = network(tokens[:, :15], use_cache=True)
    cache, found = first.past_key_values, [first.logits]
    name = "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"
    for place in range(15, 24):
        step = network(tokens[:, place : place + 1], use_cache=True, **{name: cache})
        found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-6, atol=2e-6)
    assert (whole - dense).abs().max() > 1e-3 * dense.abs().max()
    alone = network(tokens[:1], use_cache=False).logits
    torch.testing.assert_close(alone, whole[:1], rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_fewer_bits_move_the_logits_further_and_sinks_less():
    tokens = tiny.ids(2, 24)
    dense = tiny.model("llama")(tokens).logits

    def moved(text):
        return float((rounded(tiny.model("llama"), text)(tokens).logits - dense).square().mean())

    for part in ("A", "KV"):
        found = [moved(f"{part}{bits}") for bits in (8, 6, 4, 3, 2)]
        assert 0 < found[0] < found[1] < found[2] < found[3] < found[4]
    assert moved("KV3 sinks8") < moved("KV3")
    assert moved("A4g8") < moved("A4")


def test_a_folder_opens_as_it_was_measured_and_plainly_as_ordinary_weights(llama, texts, tmp_path):
    step = {"method": "rtn", "format": "W4A4KV4 g8 sinks2"}
    found = duramen.run(recipe(texts, step), str(llama), tmp_path / "out")
    assert found["steps"][0]["reopened"]["how"].startswith("duramen.load")
    assert found["steps"][0]["rounds"] == {"W4A4 g8": 21, "KV4 sinks2": 3}
    tokens, ordinary = tiny.ids(2, 24), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole, blocks = duramen.load(tmp_path / "out"), open_blocks(tmp_path / "out")
    with torch.no_grad():
        measured, plain = whole(tokens, use_cache=False).logits, ordinary(tokens, use_cache=False).logits
        (hidden,) = blocks.last_hidden([tokens])
        torch.testing.assert_close(blocks.logits(hidden), measured, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(rounded(ordinary, "A4KV4 sinks2")(tokens, use_cache=False).logits, measured)
    assert (plain - measured).abs().max() > 1e-3
    words = (tmp_path / "out" / "README.md").read_text() + (tmp_path / "out" / "report.html").read_text()
    assert "rounds as it runs" in words
    assert "as it runs the model rounds by W4A4 g8 and KV4 sinks2" in words.replace("As it", "as it")


def test_a_format_without_weights_leaves_them(llama, texts, tmp_path):
    found = duramen.run(
        recipe(texts, {"method": "rtn", "format": "A8KV8", "only": ["blocks:1-1"]}), str(llama), tmp_path / "out"
    )
    assert json.loads((tmp_path / "out" / FORMATS).read_text()).keys() == {
        *(
            f"model.layers.1.{name}_proj"
            for name in ("mlp.gate", "mlp.up", "mlp.down", *(f"self_attn.{role}" for role in "qkvo"))
        ),
        "model.layers.1.self_attn",
    }
    assert found["steps"][0]["layers"] == []
    before, after = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (llama, tmp_path / "out"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert "as it runs the model rounds" in (tmp_path / "out" / "report.html").read_text().replace("As it", "as it")


def test_a_later_step_edits_the_model_that_rounds_and_it_goes_on_rounding(llama, texts, tmp_path):
    steps = [{"method": "gptq", "format": "W4A4KV4 g8"}, {"method": "wanda", "sparsity": 0.5, "only": ["q"]}]
    duramen.run(recipe(texts, *steps), str(llama), tmp_path / "out")
    formats = json.loads((tmp_path / "out" / FORMATS).read_text())
    assert formats["model.layers.0.self_attn.q_proj"] == "A4"
    assert formats["model.layers.0.self_attn.k_proj"] == "W4A4 g8"
    assert formats["model.layers.0.self_attn"] == "KV4"
    assert duramen.inspect(str(tmp_path / "out"))["codes"]["broken"] == []


def test_stopped_it_goes_on_with_the_rounding_of_finished_blocks(llama, texts, tmp_path, stop_once):
    """A block that is read back must round as it did, or the next ones are fitted on other inputs."""
    step = {"method": "gptq", "format": "W4A3KV3 g8", "dense_target": 0.5}
    duramen.run(recipe(texts, step), str(llama), tmp_path / "whole")
    stop_once()
    with pytest.raises(KeyboardInterrupt):
        duramen.run(recipe(texts, step), str(llama), tmp_path / "again")
    duramen.run(recipe(texts, step), str(llama), tmp_path / "again")
    for name in (FORMATS, *(file.name for file in (tmp_path / "whole").glob("*.safetensors"))):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_cannot_be_reached_is_named(texts, tmp_path):
    tiny.save("bloom", tmp_path / "bloom")
    with pytest.raises(Problem, match="No keys and values"):
        duramen.plan(recipe(texts, {"method": "rtn", "format": "KV8"}), str(tmp_path / "bloom"))
    tiny.save("mamba", tmp_path / "mamba")
    with pytest.raises(Problem, match=r"The inputs of backbone\.layers\.0\.mixer\.dt_proj"):
        duramen.plan(recipe(texts, {"method": "rtn", "format": "W8A8"}), str(tmp_path / "mamba"))
    with pytest.raises(Problem, match="Groups of 7 do not divide"):
        duramen.plan(recipe(texts, {"method": "rtn", "format": "W8A8g7", "skip": ["dt"]}), str(tmp_path / "mamba"))
    found = duramen.run(
        recipe(texts, {"method": "rtn", "format": "W8A8", "skip": ["dt"]}), str(tmp_path / "mamba"), tmp_path / "out"
    )
    assert found["steps"][0]["reopened"]["largest_difference"] < 1e-3
    (tmp_path / "out" / FORMATS).write_text("{")
    with pytest.raises(Problem, match="cannot be understood"):
        duramen.load(tmp_path / "out")
