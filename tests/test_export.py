"""Exports: codes in the file are those of the folder, engines say what transformers says, and what cannot be expressed is named."""

import json

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import duramen
import tiny
from duramen.export import engine
from duramen.export.engine import compare, run_program
from duramen.export.packed import pack_words
from duramen.problem import Problem
from duramen.report.page import write_report
from duramen.rundir import read_codes
from test_quantize import recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough for blocks of 32."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=259,
        max_position_embeddings=512, bos_token_id=257, eos_token_id=258, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    network.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shorter continuations and fewer repeats than a user gets."""
    monkeypatch.setattr(engine, "NEW", 12)
    monkeypatch.setattr(engine, "REPEATS", 1)


@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.integers(1, 40))
def test_words_hold_what_was_packed(seed, bits, count):
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(seed))
    words = pack_words(codes, bits)
    back = (words.to(torch.int64)[:, :, None] >> (bits * torch.arange(32 // bits))) & (2**bits - 1)
    assert torch.equal(back.flatten(1)[:, :count], codes)


def blocks_of(folder):
    """Codes counted from zero and steps of every MatMulNBits, by the last parts of its name."""
    graph = onnx_ir.load(folder / "model.onnx").graph
    found = {}
    for node in graph:
        if node.op_type == "MatMulNBits":
            packed, scales, zeros = (value.const_value.numpy() for value in node.inputs[1:4])
            bits, outputs, inputs = (node.attributes[name].as_int() for name in ("bits", "N", "K"))
            half = packed.reshape(outputs, -1)
            codes = half if bits == 8 else np.stack([half & 15, half >> 4], -1).reshape(outputs, -1)
            zeros = zeros.reshape(outputs, -1)
            zeros = zeros if bits == 8 else np.stack([zeros & 15, zeros >> 4], -1).reshape(outputs, -1)
            steps = scales.reshape(outputs, -1)
            times = inputs // steps.shape[1]
            found[node.name] = (
                codes[:, :inputs].astype(int) - np.repeat(zeros[:, : steps.shape[1]], times, 1),
                np.repeat(steps, times, 1),
            )
    return found


@pytest.mark.parametrize("text", ["W4 g32", "W3 row", "W8 g32 affine"])
def test_onnx_has_the_codes_and_says_what_transformers_says(text, model, texts, tmp_path):
    duramen.run(recipe(texts, {"method": "gptq", "format": text}), str(model), tmp_path / "out")
    found = duramen.export("onnx", str(tmp_path / "out"), tmp_path / "onnx")
    assert (found["type"], found["coded"]) == ("float", 14)
    assert found["ran"]["ONNX Runtime"]["agreed"] == found["ran"]["ONNX Runtime"]["prompts"] == 20
    assert found["ran"]["ONNX Runtime"]["largest_difference"] < 1e-5 * found["ran"]["ONNX Runtime"]["largest_logit"]
    stored, written = read_codes(tmp_path / "out"), blocks_of(tmp_path / "onnx")
    for layer, node in (("mlp.down_proj", "mlp/down_proj"), ("self_attn.o_proj", "attn/o_proj")):
        codes, steps = next(each for name, each in written.items() if f"layers.1/{node}" in name)
        quantized = stored[f"model.layers.1.{layer}"]
        assert torch.equal(torch.from_numpy(codes * steps).float(), quantized.weight())


def test_onnx_with_inputs_of_eight_bits_and_several_formats(model, texts, tmp_path):
    """The builder takes codes of all layers or of none."""
    steps = [
        {"method": "rtn", "format": "W4A8 g32", "only": ["q", "k", "v", "o"]},
        {"method": "rtn", "format": "W8A8 row", "only": ["gate", "up", "down"]},
    ]
    duramen.run(recipe(texts, *steps[:1]), str(model), tmp_path / "part")
    with pytest.raises(Problem, match=r"6 layers have no codes, model\.layers\.0\.mlp\.down_proj"):
        duramen.export("onnx", str(tmp_path / "part"), tmp_path / "no")
    duramen.run(recipe(texts, *steps), str(model), tmp_path / "out")
    found = duramen.export("onnx", str(tmp_path / "out"), tmp_path / "onnx")
    assert (found["type"], found["coded"]) == ("int8", 14)
    assert found["ran"]["ONNX Runtime"]["largest_difference"] < 0.05 * found["ran"]["ONNX Runtime"]["largest_logit"]
    exact = duramen.export("onnx", str(tmp_path / "out"), tmp_path / "float", kind="float")
    assert exact["ran"]["ONNX Runtime"]["agreed"] == 20
    with pytest.raises(Problem, match="is not empty"):
        duramen.export("onnx", str(tmp_path / "out"), tmp_path / "onnx")


def test_onnx_of_a_model_that_was_not_rounded(model, tmp_path):
    found = duramen.export("onnx", str(model), tmp_path / "onnx")
    assert found["coded"] == 0
    assert found["ran"]["ONNX Runtime"]["agreed"] == 20


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("W4 g32", "pack-quantized"),
        ("W3 row", "pack-quantized"),
        ("W8A8 row", "int-quantized"),
        ("W4A8KV8 g16", "pack-quantized"),
    ],
)
def test_compressed_opens_in_plain_transformers(text, layout, model, texts, tmp_path):
    duramen.run(recipe(texts, {"method": "rtn", "format": text, "skip": ["v"]}), str(model), tmp_path / "out")
    found = duramen.export("compressed", str(tmp_path / "out"), tmp_path / "packed")
    assert (found["coded"], found["layouts"]) == (12, [layout])
    assert found["largest_difference"] <= (0.02 * found["largest_logit"] if "A8" in text else 0)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.v_proj.weight"].dtype == torch.float32
    quantized = read_codes(tmp_path / "out")["model.layers.1.mlp.down_proj"]
    if layout == "int-quantized":
        assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], quantized.codes)
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight_scale"], quantized.steps)
    assert (
        json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "compressed-tensors"
    )


def test_a_recipe_exports_what_it_made_and_the_report_says_so(model, texts, tmp_path):
    steps = [
        {"method": "multiweight", "pattern": "2:4", "effort": "fast"},
        {"method": "gptq", "format": "W4A8 g32"},
        {"method": "qat", "steps": 2, "every": 1, "batch": 2},
        {"method": "export", "form": "onnx", "id": "onnx"},
        {"method": "export", "form": "compressed", "id": "packed"},
        {"method": "export", "form": "gguf"},
    ]
    with pytest.raises(Problem, match="Two exports would both be `exports/onnx`"):
        duramen.plan(recipe(texts, *steps[:4], steps[4] | {"id": "onnx"}), str(model))
    planned = duramen.plan(recipe(texts, *steps), str(model))
    assert "ONNX Runtime" in planned["steps"][3]["note"]
    found = duramen.run(recipe(texts, *steps), str(model), tmp_path / "out")
    forms = {each["form"]: each for each in found["exports"]}
    assert {name: each["coded"] for name, each in forms.items()} == {"onnx": 14, "compressed": 14, "gguf": 14}
    assert all((tmp_path / "out" / each["file"]).exists() for each in forms.values())
    assert forms["gguf"]["ran"]["OpenVINO"]["agreed"] >= 15, "codes as they are; the rest in half precision"
    page = write_report(tmp_path / "out", found).read_text()
    assert "ONNX Runtime" in page
    assert f"{forms['onnx']['ran']['ONNX Runtime']['agreed']} of 20" in page
    assert "## Exports" in (tmp_path / "out" / "README.md").read_text()
    again = duramen.run(recipe(texts, *steps), str(model), tmp_path / "out")
    assert again == found


def test_what_cannot_be_written_is_said(model, texts, llama, tmp_path, monkeypatch):
    def rounded(name, text, source=model, **more):
        duramen.run(recipe(texts, {"method": "rtn", "format": text, **more}), str(source), tmp_path / name)
        return str(tmp_path / name)

    with pytest.raises(Problem, match=r"model\.layers\.0\.\S+ cannot be written with its codes: 8 inputs"):
        duramen.export("onnx", rounded("narrow", "W4 g8"), tmp_path / "a")
    with pytest.raises(Problem, match="cannot be written as compressed-tensors") as caught:
        duramen.export("compressed", rounded("four", "W4A4 g32"), tmp_path / "b")
    assert "only `A8` is executed" in caught.value.why
    with pytest.raises(Problem, match="cannot be written as compressed-tensors"):
        duramen.export("compressed", rounded("affine", "W4 g32 affine"), tmp_path / "c")
    with pytest.raises(Problem, match="has no codes"):
        duramen.export("compressed", str(model), tmp_path / "d")
    tiny.save("gpt2", tmp_path / "gpt2")
    with pytest.raises(Problem, match="cannot be written"):
        duramen.export("compressed", rounded("transposed", "W4 g8", tmp_path / "gpt2"), tmp_path / "e")
    tiny.save("mamba", tmp_path / "mamba")
    with pytest.raises(Problem, match="does not build a model"):
        duramen.export("onnx", str(tmp_path / "mamba"), tmp_path / "f")
    monkeypatch.setattr("duramen.problem.find_spec", lambda name: None if name == "onnx_ir" else True)
    with pytest.raises(Problem, match="ONNX needs onnx_ir, which is not installed"):
        duramen.export("onnx", str(model), tmp_path / "g")


def test_a_crash_is_the_engines_own(tmp_path):
    (tmp_path / "crash.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(Problem) as caught:
        run_program([str(tmp_path / "crash.py")], "It did not run")
    assert "SIGSEGV" in caught.value.why
    (tmp_path / "error.py").write_text("import sys\nprint('loading', file=sys.stderr)\nraise ValueError('no such block')\n")
    with pytest.raises(Problem) as caught:
        run_program([str(tmp_path / "error.py")], "It did not run")
    assert caught.value.why == "it says: ValueError: no such block"


def test_where_two_part_the_gap_is_what_the_network_says(monkeypatch):
    monkeypatch.setattr(engine, "NEW", 4)
    network, ids = tiny.model("llama"), tiny.ids(1, 6)
    tokens, expected = ids, []
    with torch.no_grad():
        for _ in range(4):
            logits = network(tokens).logits[0, -1]
            expected.append(logits)
            tokens = torch.cat([tokens, logits.argmax()[None, None]], 1)
    said = [int(logits.argmax()) for logits in expected]
    other = int(expected[2].argsort()[-2])
    answer = {
        "tokens": np.array([said, [*said[:2], other, 0]]),
        "logits": np.stack([expected[0].numpy(), expected[0].numpy() + 0.5]),
    }
    found = compare(network, [ids[0].tolist()] * 2, answer)
    assert (found["agreed"], len(found["apart"])) == (1, 1)
    assert found["apart"][0]["step"] == 2
    assert found["apart"][0]["gap"] == pytest.approx(float(expected[2].max() - expected[2][other]), rel=1e-4)
    assert found["largest_difference"] == pytest.approx(0.5, rel=1e-4)
