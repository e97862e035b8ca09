"""Quantization of whole models: codes beside ordinary weights, masks that stay, runs that go on, and what a later step makes stale."""

import itertools
import json
import math

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import duramen
import tiny
from duramen.export.gguf import export_gguf
from duramen.grids import Quantized, parse_format
from duramen.problem import Problem
from duramen.quantize.allocation import choose_widths
from duramen.quantize.steps import rounded_to
from duramen.report.page import write_report
from duramen.rundir import CODES, FORMATS, MASKS, unpack_mask


def recipe(texts, *steps):
    calibration = {"text": [str(texts[0])], "sequences": 8, "length": 64}
    return {"name": "tiny", "dtype": "float32", "calibration": calibration, "steps": list(steps)}


def rounding(**more):
    return {"method": "gptq", "format": "W3 g8", **more}


def weights(folder):
    return {key: tensor for file in folder.glob("model*.safetensors") for key, tensor in load_file(file).items()}


def codes(folder):
    tensors, grids = load_file(folder / CODES), json.loads((folder / FORMATS).read_text())
    return {
        name: Quantized(
            tensors[f"{name}.codes"], tensors[f"{name}.steps"], tensors.get(f"{name}.zeros"), parse_format(text).weights
        )
        for name, text in grids.items()
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mamba2", "jamba"])
@pytest.mark.parametrize("step", [rounding(format="W3 g4"), {"method": "rtn", "format": "W4 row affine"}])
def test_every_family_is_what_its_codes_say(name, step, texts, tmp_path):
    """gpt2 stores its weights [I, O]."""
    tiny.save(name, tmp_path / "model")
    found = duramen.run(recipe(texts, step), str(tmp_path / "model"), tmp_path / "out")
    layers = found["steps"][0]["layers"]
    assert duramen.inspect(str(tmp_path / "out"))["codes"] == {"modules": {step["format"]: len(layers)}, "broken": []}
    assert all(0 < layer["relative_error"] < 0.5 for layer in layers)
    stored = codes(tmp_path / "out")
    for layer in layers:
        each = stored[layer["layer"]]
        assert each.grid.least <= int(each.codes.min()) <= int(each.codes.max()) <= each.grid.most
        assert each.steps.dtype == torch.float16
        extra = 16 + each.grid.bits * each.grid.affine
        assert layer["bits"] == pytest.approx(each.grid.bits + extra * each.steps.numel() / each.codes.numel())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tiny.ids()).logits.isfinite().all()
    page = write_report(tmp_path / "out", found).read_text()
    assert "Bits per weight" in page
    assert "bits each" in page


def test_refined_rounding_is_nearer_than_gptq_and_that_than_nearest(llama, texts, tmp_path):
    """Summed over the layers of a model, which is only so in practice."""
    errors = []
    for number, step in enumerate((rounding(), rounding(refine=0), {"method": "rtn", "format": "W3 g8"})):
        found = duramen.run(recipe(texts, step), str(llama), tmp_path / str(number))
        errors.append(sum(layer["relative_error"] for layer in found["steps"][0]["layers"]))
    assert errors[0] < errors[1] < errors[2]


def test_masks_stay_and_the_zeros_with_them(llama, texts, tmp_path):
    prune = {"method": "multiweight", "pattern": "2:4", "effort": "fast"}
    duramen.run(recipe(texts, prune, rounding(damping="held-out", dense_target=0.25)), str(llama), tmp_path / "out")
    duramen.run(recipe(texts, prune), str(llama), tmp_path / "pruned")
    masks, before = load_file(tmp_path / "out" / MASKS), load_file(tmp_path / "pruned" / MASKS)
    assert masks.keys() == before.keys()
    assert all(torch.equal(masks[name], before[name]) for name in masks)
    stored = weights(tmp_path / "out")
    for name, packed in masks.items():
        pruned = unpack_mask(packed, stored[f"{name}.weight"].shape[1])
        assert (stored[f"{name}.weight"][pruned] == 0).all()
    assert duramen.inspect(str(tmp_path / "out"))["masks"]["broken"] == []


def test_a_later_step_takes_the_codes_of_what_it_edits(llama, texts, tmp_path):
    prune = {"method": "wanda", "sparsity": 0.5, "only": ["q"]}
    duramen.run(recipe(texts, rounding(), prune), str(llama), tmp_path / "out")
    left = codes(tmp_path / "out")
    assert left
    assert not any(name.endswith("q_proj") for name in left)
    assert duramen.inspect(str(tmp_path / "out"))["codes"]["broken"] == []


def test_stopped_and_run_again_it_ends_with_the_same_bytes(llama, texts, tmp_path, stop_once):
    duramen.run(recipe(texts, rounding()), str(llama), tmp_path / "whole")
    stop_once()
    with pytest.raises(KeyboardInterrupt):
        duramen.run(recipe(texts, rounding()), str(llama), tmp_path / "again")
    duramen.run(recipe(texts, rounding()), str(llama), tmp_path / "again")
    for name in (CODES, FORMATS, *(file.name for file in (tmp_path / "whole").glob("model*"))):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_weight_that_is_not_what_its_code_says_is_named(llama, texts, tmp_path):
    duramen.run(recipe(texts, rounding(only=["o"])), str(llama), tmp_path / "out")
    (file,) = [
        each
        for each in (tmp_path / "out").glob("model*")
        if each.suffix == ".safetensors" and "model.layers.1.self_attn.o_proj.weight" in load_file(each)
    ]
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert duramen.inspect(str(tmp_path / "out"))["codes"]["broken"] == ["model.layers.1.self_attn.o_proj"]


def test_plan_says_the_bits_and_bad_words_stop_before_the_walk(llama, texts, tmp_path):
    planned = duramen.plan(recipe(texts, rounding()), str(llama))
    assert "5.00 bits per weight in 21 layers" in planned["steps"][0]["note"]
    wide = duramen.plan(recipe(texts, rounding(step_type="float32")), str(llama))
    assert "7.00 bits per weight in 21 layers" in wide["steps"][0]["note"]
    with pytest.raises(Problem, match="is no format"):
        duramen.run(recipe(texts, rounding(format="W3 columns")), str(llama), tmp_path / "a")
    with pytest.raises(Problem, match=r"inputs of model\.layers\.0\.self_attn\.q_proj"):
        duramen.run(recipe(texts, rounding(format="W3 g7")), str(llama), tmp_path / "b")
    assert not list((tmp_path / "b").glob("model*"))


@pytest.mark.parametrize(
    ("grid", "kind"),
    [("W4 g32", "Q4_0"), ("W3 row", "Q4_0"), ("W8 g64", "Q8_0"), ("W4 tensor narrow", "Q4_0"), ("W4 g32 affine", None)],
)
def test_codes_go_into_gguf_as_they_are(grid, kind, texts, tmp_path):
    """Bit for bit, with q and k in llama.cpp's order of rows; an affine grid has no such blocks and goes as it is."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=259,
        max_position_embeddings=512, bos_token_id=257, eos_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    duramen.run(recipe(texts, rounding(format=grid)), str(tmp_path / "model"), tmp_path / "out")
    file = tmp_path / "model.gguf"
    found = export_gguf(tmp_path / "out", file, kind="f32")
    assert found["coded"] == (14 if kind else 0)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    stored = codes(tmp_path / "out")
    for layer, name in (("mlp.down_proj", "ffn_down"), ("self_attn.k_proj", "attn_k")):
        there, here = tensors[f"blk.1.{name}.weight"], stored[f"model.layers.1.{layer}"].weight()
        assert there.tensor_type.name == (kind or "F32")
        if name == "attn_k":
            here = here.view(2, 2, 8, 64).transpose(1, 2).reshape(32, 64)
        values = gguf.quants.dequantize(there.data, there.tensor_type).reshape(here.shape)
        assert torch.equal(torch.from_numpy(values.copy()), here)


def surveys(seed, layers=6, widths=(2, 3, 4)):
    """Errors that fall with width, and bits that rise with it."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(layers):
        size = int(torch.randint(50, 400, (1,), generator=generator))
        errors = torch.rand(len(widths), generator=generator).sort(descending=True).values * float(
            torch.rand(1, generator=generator)
        )
        found.append(
            {
                "name": f"layer {number}",
                "size": size,
                "errors": errors.tolist(),
                "bits": [size * width + 32 for width in widths],
            }
        )
    return found


@pytest.mark.parametrize("seed", range(8))
def test_widths_are_the_best_of_all_choices(seed):
    """Against every one of 729 choices, and a dynamic programme over whole bits."""
    items, widths = surveys(seed), (2, 3, 4)
    size = sum(item["size"] for item in items)
    for mean in (2.4, 2.9, 3.3):
        chosen = choose_widths(items, widths, mean)
        places = [widths.index(chosen[item["name"]]) for item in items]
        assert sum(item["bits"][place] for item, place in zip(items, places)) <= mean * size
        found = sum(item["errors"][place] for item, place in zip(items, places))
        best = min(
            sum(item["errors"][place] for item, place in zip(items, choice))
            for choice in itertools.product(range(3), repeat=6)
            if sum(item["bits"][place] for item, place in zip(items, choice)) <= mean * size
        )
        assert found == pytest.approx(best, rel=1e-9)
        table = {0: 0.0}
        for item in items:
            table_next = {}
            for bits, error in table.items():
                for place in range(3):
                    total = bits + item["bits"][place]
                    if total <= mean * size:
                        table_next[total] = min(table_next.get(total, math.inf), error + item["errors"][place])
            table = table_next
        assert found == pytest.approx(min(table.values()), rel=1e-9)
    with pytest.raises(Problem, match="too few"):
        choose_widths(items, widths, 1.9)


def test_a_budget_of_bits_is_kept_and_bettered_by_choosing(llama, texts, tmp_path):
    one = duramen.run(recipe(texts, {"method": "rtn", "format": "W4A8 g8"}), str(llama), tmp_path / "one")
    found = duramen.run(recipe(texts, {"method": "rtn", "format": "W4A8 g8", "mean_bits": 6.0}), str(llama), tmp_path / "mixed")
    layers = found["steps"][0]["layers"]
    size = sum(layer["size"] for layer in layers)
    assert 5.8 < sum(layer["bits"] * layer["size"] for layer in layers) / size <= 6.0
    assert len({layer["bits"] for layer in layers}) > 1
    assert sum(layer["relative_error"] for layer in layers) < sum(
        layer["relative_error"] for layer in one["steps"][0]["layers"]
    )
    assert duramen.inspect(str(tmp_path / "mixed"))["codes"]["broken"] == []
    planned = duramen.plan(recipe(texts, {"method": "gptq", "format": "W4 g8", "mean_bits": 5.5}), str(llama))
    assert "5.50 bits per weight" in planned["steps"][0]["note"]
    with pytest.raises(Problem, match="too few"):
        duramen.run(recipe(texts, {"method": "rtn", "format": "W4 g8", "mean_bits": 3.0}), str(llama), tmp_path / "no")
    with pytest.raises(Problem, match="budget of weights"):
        duramen.plan(recipe(texts, {"method": "rtn", "format": "A8", "mean_bits": 3.0}), str(llama))


def test_a_second_rounding_adds_to_the_first(texts, tmp_path):
    """Codes and the rounding of inputs, in either order."""
    tiny.save("llama", tmp_path / "model")
    weights_, inputs = rounding(format="W4 g8"), {"method": "rtn", "format": "A8"}
    for place, steps in (("a", (weights_, inputs)), ("b", (inputs, weights_))):
        duramen.run(recipe(texts, *steps), str(tmp_path / "model"), tmp_path / place)
        found = duramen.inspect(str(tmp_path / place))["codes"]
        assert found["modules"] == {"W4A8 g8": 21}
        assert found["broken"] == []


def test_codes_of_zero_are_no_removed_weights(texts, tmp_path):
    tiny.save("llama", tmp_path / "model")
    steps = [{"method": "rtn", "format": "W2 row"}, {"method": "gptq", "format": "W8 row"}]
    duramen.run(recipe(texts, *steps), str(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out" / MASKS).is_file()


def test_small_steps_are_stored_as_they_are():
    steps = torch.tensor([2.0**-20, 1e-6, 0.0])
    assert rounded_to(steps, torch.float16).tolist() == pytest.approx([2.0**-20, 1e-6, 2.0**-24], rel=0.05)


def test_what_rounds_as_it_runs_is_not_folded(texts, tmp_path):
    tiny.save("llama", tmp_path / "model")
    for step in ("smooth", "rotate"):
        with pytest.raises(Problem, match=f"`{step}` cannot follow `rtn`"):
            duramen.run(
                recipe(texts, {"method": "rtn", "format": "KV4"}, {"method": step}), str(tmp_path / "model"), tmp_path / step
            )
