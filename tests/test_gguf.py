"""GGUF: what is written comes back, llama.cpp goes on as transformers does, and what cannot be expressed is refused."""

import json

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import duramen
import tiny
from duramen.export.engine import NotRun
from duramen.export.gguf import SPLIT_LLAMA3, _split_name, export_gguf, run_gguf
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.shrink.plan import Plan, digest
from duramen.shrink.surgery import shrunk

PROMPTS = [tiny.prose(seed, 27)[:40] for seed in range(20)]


def readable(network):
    """The same model, which only says letters: other bytes are no text alone, and llama.cpp gives text."""
    head = network.get_output_embeddings().weight
    letters = tiny.tokenizer()("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    with torch.no_grad():
        head.copy_(torch.zeros_like(head).index_copy(0, torch.tensor(letters), head[letters]))
    return network


def cut(folder, *, skipped, dropped=(), config=None):
    """A model of which something is left, as a folder."""
    torch.manual_seed(0)
    network = tiny.model("llama") if config is None else AutoModelForCausalLM.from_config(config).eval()
    model = BlockModel.from_module(readable(network))
    kept = {
        "ffn_channel": tuple(tuple(range(width)) for width in (48, 20, 33)),
        "kv_group": ((0, 1), (1,), (0, 1)),
    }
    plan = Plan(digest(model), 3, kept, skipped=skipped, dropped=dropped)
    shrunk(model, plan).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    "skipped",
    [
        {},
        {1: ("mlp",)},
        {1: ("attention",), 2: ("mlp",)},
        {1: ("attention", "mlp")},
        {2: ("attention", "mlp")},
        {2: ("attention",)},
    ],
    ids=str,
)
def test_llama_cpp_goes_on_as_transformers_does(skipped, tmp_path):
    folder = cut(tmp_path / "model", skipped=skipped)
    found = export_gguf(folder, tmp_path / "model.gguf", kind="f32")
    assert found["architecture"] == "deci"
    assert found["largest_error"] == 0
    assert found["ran"]["llama.cpp"]["agreed"] == found["ran"]["llama.cpp"]["prompts"] == 20
    header = fields(tmp_path / "model.gguf")
    assert header["deci.attention.head_count"] == [
        0 if "attention" in skipped.get(b, ()) else n for b, n in enumerate((4, 2, 4)) if len(skipped.get(b, ())) < 2
    ]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_model_whose_blocks_are_alike_is_an_ordinary_llama(name, tmp_path):
    folder = tmp_path / "model"
    readable(tiny.model(name)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    found = export_gguf(folder, tmp_path / "model.gguf", kind="f32")
    assert found["architecture"] == "llama"
    assert found["ran"]["llama.cpp"]["agreed"] == found["ran"]["llama.cpp"]["prompts"] == 20
    assert fields(tmp_path / "model.gguf")["llama.feed_forward_length"] == 48
    assert "OpenVINO" not in found["ran"], "it reads no float32"
    again = export_gguf(folder, tmp_path / "half.gguf", kind="f16")
    assert again["ran"]["OpenVINO"]["agreed"] >= 18
    assert fields(tmp_path / "half.gguf")["general.file_type"] == 1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_other_rotary_tables_are_kept(rope, tmp_path):
    config = LlamaConfig(**tiny._LLAMA, rope_parameters=rope, tie_word_embeddings=True)
    folder = cut(tmp_path / "model", skipped={}, config=config)
    export_gguf(folder, tmp_path / "model.gguf", kind="f32")
    assert "rope_freqs.weight" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert run_gguf("llama.cpp", tmp_path / "model.gguf", folder, [prompt * 3 for prompt in PROMPTS])["agreed"] == 20


@pytest.mark.parametrize(("kind", "error"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 2**-7)])
def test_types_round_as_little_as_they_should(kind, error, tmp_path):
    folder = cut(tmp_path / "model", skipped={})
    found = export_gguf(folder, tmp_path / "model.gguf", kind=kind)
    assert 0 < found["largest_error"] <= error
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert stored["blk.0.attn_norm.weight"] == "F32"
    assert stored["blk.0.attn_q.weight"].lower() == kind
    assert stored["blk.1.ffn_down.weight"].lower() == ("f32" if kind == "q8_0" else kind), "20 entries are no block of 32"


def test_the_command_writes_checks_and_says_so(tmp_path, capsys):
    folder = cut(tmp_path / "model", skipped={1: ("mlp",)})
    found = duramen.export("gguf", str(folder), tmp_path / "out.gguf")
    assert found["type"] == "f16"
    assert found["ran"]["llama.cpp"]["agreed"] >= 1
    for wrong in ({"form": "onnx", "kind": "f16"}, {"form": "gguf", "kind": "q3"}, {"form": "compressed", "kind": "float"}):
        with pytest.raises(Problem, match="has no type"):
            duramen.export(model=str(folder), out=tmp_path / "no", **wrong)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["qwen2", "opt", "gpt2", "gemma3_text", "smollm3"])
def test_other_arithmetic_is_refused(name, tmp_path):
    folder = tiny.save(name, tmp_path / "model")
    with pytest.raises(Problem, match="cannot be written as GGUF"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_another_activation_and_a_first_block_without_attention_are_refused(tmp_path):
    odd = cut(tmp_path / "gelu", skipped={}, config=LlamaConfig(**tiny._LLAMA, hidden_act="gelu"))
    with pytest.raises(Problem, match="with gelu as activation"):
        export_gguf(odd, tmp_path / "model.gguf")
    headless = cut(tmp_path / "headless", skipped={1: ("attention",)}, dropped=(0,))
    with pytest.raises(Problem, match="first block of this model has no attention"):
        export_gguf(headless, tmp_path / "model.gguf")


def test_a_rotary_table_that_depends_on_the_length_is_refused(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    folder = cut(tmp_path / "model", skipped={}, config=LlamaConfig(**tiny._LLAMA, rope_parameters=rope))
    with pytest.raises(Problem, match="rotary table `yarn`"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_splits_have_the_names_that_llama_cpp_gives_them():
    level = pre_tokenizers.ByteLevel

    def named(steps):
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
        return _split_name(json.loads(inner.to_str())["pre_tokenizer"])

    def split(pattern):
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    assert named([level(add_prefix_space=False)]) == "gpt-2"
    assert named([pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)]) == "smollm"
    assert named([split(SPLIT_LLAMA3), level(add_prefix_space=False, use_regex=False)]) == "llama-bpe"
    assert named([level(add_prefix_space=True)]) is None
    assert named([split(r"\d+"), level(add_prefix_space=False, use_regex=False)]) is None
    assert _split_name(None) is None


def test_another_tokenizer_is_refused(tmp_path):
    folder = tiny.save("llama", tmp_path / "model")
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    inner.normalizer = normalizers.NFKC()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    with pytest.raises(Problem, match="The tokenizer of"):
        export_gguf(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize(("wrong", "stays"), [(NotRun, True), (Problem, False)])
def test_a_crash_takes_no_file_away_and_other_words_do(wrong, stays, tmp_path, monkeypatch):
    def ends(*_, **__):
        raise wrong("It ended.", why="it was ended by SIGSEGV.", fix="another one.")

    folder, file = cut(tmp_path / "model", skipped={}), tmp_path / "model.gguf"
    monkeypatch.setattr("duramen.export.gguf.run_gguf", ends)
    if stays:
        assert export_gguf(folder, file)["ran"]["llama.cpp"] == {"failed": "it was ended by SIGSEGV."}
    else:
        with pytest.raises(Problem, match="It ended"):
            export_gguf(folder, file)
    assert file.is_file() == stays
