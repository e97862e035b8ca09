"""GGUF for llama.cpp: the architecture ``llama`` where all blocks are alike, else ``deci``, which has widths for every block.

What ``deci`` can hold: FFN widths, KV groups and query heads of each block, blocks without attention, blocks without MLP. An MLP that was
left out stands as 32 channels of zeros where the block keeps its attention, since llama.cpp forgets the output of an attention that no
MLP follows. All heads have one width and one rotary table. Rows of q and k change places: llama.cpp turns neighbouring entries of a head
by one angle, transformers those that are half a head apart.

Layers that were rounded to a symmetric grid go into the file code by code, as Q4_0 or Q8_0, whose blocks of 32 all get the step of their row or group; the package's own
quantizer would choose steps anew and lose what was fitted. llama.cpp executes both as integers, with activations of eight bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from duramen.export.engine import PROMPTS, hold_against, run_or_said
from duramen.families import OWN
from duramen.families.model import BlockModel
from duramen.grids import Inputs, Quantized
from duramen.hardware.machine import total_memory
from duramen.problem import Exit, Problem, need
from duramen.rundir import read_codes, replacing

Type = Literal["f32", "f16", "bf16", "q8_0"]
FAMILIES = ("llama", "mistral")
"""Model types whose arithmetic is that of the two architectures."""
PROGRAMS = {"llama.cpp": "llama_cpp", "OpenVINO": "openvino_gguf"}
"""What opens the file, by name, and the program of ``duramen.export.engines`` that does so."""
ZEROS = 32
"""Channels that stand for an MLP that was left out."""
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Modules of a block -> their names in GGUF."""
SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Shape:
    """Widths of one block, and which one it is; zeros where a part is left out."""

    block: int
    heads: int
    groups: int
    ffn: int


def export_gguf(folder: Path, file: Path, *, kind: Type = "f16") -> dict[str, Any]:
    """Writes a model folder as one GGUF file, reads it back, and runs it in llama.cpp and OpenVINO, where these are installed.

    Args:
        folder: A Hugging Face folder.
        file: Where to write.
        kind: Type of the matrices that were not rounded to a grid of blocks; vectors are float32.

    Returns:
        ``architecture``, ``bytes``, ``tensors``; how many of them are ``coded``; ``largest_error`` of an entry read back, relative to its tensor's largest; and what
        every engine that is installed said when it ``ran``, see ``duramen.export.engine``: none where two copies of the model would not fit in memory, and llama.cpp alone where blocks differ,
        the rotary table is scaled or the type is `f32` or `bf16`.

    Raises:
        Problem: If the model cannot be expressed, a tensor does not come back, or an engine says something else.
    """
    need("GGUF", "gguf", install="gguf")
    import gguf

    model = BlockModel.from_folder(folder, dtype=torch.float32)
    codes = {name: found for name, found in read_codes(folder).items() if _fits_blocks(found)}
    shapes = gguf_shapes(model)
    alike = _alike(shapes) and 0 not in (shapes[0].heads, shapes[0].ffn)
    architecture = "llama" if alike else "deci"
    with replacing(file) as unfinished:
        writer = gguf.GGUFWriter(unfinished, architecture, use_temp_file=True)
        _write_header(writer, model, shapes, folder.resolve().name)
        _write_type(writer, codes, kind)
        _write_tokenizer(writer, folder)
        coded = 0
        for name, tensor, quantized in _tensors(model, shapes, codes):
            array, raw = _packed(tensor, kind) if quantized is None else _blocks(quantized)
            coded += quantized is not None
            writer.add_tensor(name, array, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        count, error = _read_back(unfinished, _tensors(model, shapes, codes), kind)
        small = 16 * sum(p.numel() for p in model.network.parameters()) < total_memory()
        plain = architecture == "llama" and _rotary_factors(model) is None and kind in ("f16", "q8_0")
        there = {"llama.cpp": find_spec("xllamacpp"), "OpenVINO": plain and find_spec("openvino_genai")}
        ran = {
            engine: run_or_said(partial(run_gguf, engine, unfinished, folder, coded=codes))
            for engine in there
            if there[engine] and small
        }
    return {
        "architecture": architecture, "bytes": file.stat().st_size, "tensors": count, "coded": coded, "largest_error": error, "ran": ran,
    }  # fmt: skip


def run_gguf(
    engine: str, file: Path, folder: Path, texts: Sequence[str] = PROMPTS, *, coded: Iterable[str] = ()
) -> dict[str, Any]:
    """Lets an engine continue prompts, and holds them against those of transformers in float32.

    Where two tokens are about equally likely, the rounding of the file's matrices may decide.

    Args:
        engine: One of ``PROGRAMS``.
        file: The GGUF file.
        folder: What it was made of.
        texts: What is continued.
        coded: Layers whose codes are in the file; llama.cpp rounds their inputs to eight bits in blocks of 32, and so does the network here; OpenVINO is told not to.

    Raises:
        Problem: If not one is alike.
    """
    inputs = dict.fromkeys(coded if engine == "llama.cpp" else (), Inputs(8, 32))
    with TemporaryDirectory() as place:
        named = Path(place) / "model.gguf"  # OpenVINO knows the format by the name
        named.symlink_to(file.resolve())
        found = hold_against(PROGRAMS[engine], named, folder, texts=texts, inputs=inputs)
    if not found["agreed"]:
        raise Problem(
            f"{engine} continues none of {len(texts)} prompts as transformers does.",
            why=f"the arithmetic of {file.name} is not that of {folder}.",
            fix="please report it, with the config of the model.",
            code=Exit.CHECK_FAILED,
        )
    return found


def gguf_shapes(model: BlockModel) -> list[Shape]:
    """Widths of all blocks; those that have neither part pass their input on, and are left out.

    Raises:
        Problem: If the architecture, a bias or the activation has no counterpart, or the first block has no attention.
    """
    base = str(model.config.model_type).removeprefix(OWN)
    odd = " with biases" if any(name.endswith(".bias") for name, _ in model.network.named_parameters()) else ""
    if getattr(model.config, "hidden_act", "silu") != "silu":
        odd += f" with {model.config.hidden_act} as activation"
    if base not in FAMILIES or odd:
        raise Problem(
            f"A model of type {base}{odd} cannot be written as GGUF.",
            why=f"its arithmetic is not that of llama.cpp's `llama` and `deci`; {', '.join(FAMILIES)} without biases, with SiLU, are.",
            fix="the folder itself opens in transformers; for a uniform model llama.cpp's own converter may do.",
            code=Exit.INCOMPATIBLE,
        )
    found = []
    for index in range(len(model.blocks)):
        sizes, skipped = model.sizes(index), getattr(model.config.per_layer_config[index], "skip", None) or ()
        attention, mlp = "attention" not in skipped, "mlp" not in skipped
        ffn = sizes.ffn if mlp else ZEROS if attention else 0
        found.append(Shape(index, sizes.heads if attention else 0, sizes.groups if attention else 0, ffn))
    stay = [shape for shape in found if shape.heads or shape.ffn]
    if not stay or not stay[0].heads:
        raise Problem(
            "The first block of this model has no attention, which llama.cpp cannot open.",
            why="it takes the sizes of heads from the first block.",
            fix="keep the attention of the first block (`skip: [blocks:0]` in the step that cuts).",
            code=Exit.INCOMPATIBLE,
        )
    return stay


def _alike(shapes: Sequence[Shape]) -> bool:
    return len({(shape.heads, shape.groups, shape.ffn) for shape in shapes}) == 1


def _write_header(writer: Any, model: BlockModel, shapes: Sequence[Shape], name: str) -> None:
    config, head = model.config, model.sizes(0).head
    same = _alike(shapes)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings

    def of(values: Sequence[int]) -> Any:
        return values[0] if same else list(values)

    writer.add_name(name)
    writer.add_block_count(len(shapes))
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(of([shape.ffn for shape in shapes]))
    writer.add_head_count(of([shape.heads for shape in shapes]))
    writer.add_head_count_kv(of([shape.groups for shape in shapes]))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_type(writer: Any, codes: Mapping[str, Quantized], kind: Type) -> None:
    """The type of most matrices, which OpenVINO wants to know."""
    import gguf

    types = gguf.LlamaFileType
    plain = {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16, "q8_0": types.MOSTLY_Q8_0}[kind]
    few = sum(quantized.grid.bits <= 4 for quantized in codes.values())
    coded = types.MOSTLY_Q4_0 if 2 * few >= len(codes) else types.MOSTLY_Q8_0
    writer.add_file_type(coded if codes else plain)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _fits_blocks(quantized: Quantized) -> bool:
    """Whether blocks of 32 with one 16-bit step each can hold a matrix."""
    inputs = quantized.codes.shape[1]
    whole = inputs % 32 == 0 and quantized.grid.width(inputs) % 32 == 0
    return whole and quantized.zeros is None and quantized.steps.dtype == torch.float16


def _blocks(quantized: Quantized) -> tuple[np.ndarray, Any]:
    """Codes as Q4_0 (a step and 16 pairs of codes, the first half of 32 in the low bits) or Q8_0 (a step and 32 codes), and which it is."""
    import gguf

    codes = quantized.codes.view(len(quantized.codes), -1, 32)
    steps = quantized.steps.repeat_interleave(codes.shape[1] // quantized.steps.shape[1], 1)
    scales = steps.numpy()[:, :, None].view(np.uint8)
    if quantized.grid.bits > 4:
        packed, kind = codes.numpy().view(np.uint8), gguf.GGMLQuantizationType.Q8_0
    else:
        nibbles = (codes + 8).to(torch.uint8)
        packed, kind = (nibbles[:, :, :16] | nibbles[:, :, 16:] << 4).numpy(), gguf.GGMLQuantizationType.Q4_0
    return np.concatenate([scales, packed], -1).reshape(len(codes), -1), kind


def _tensors(
    model: BlockModel, shapes: Sequence[Shape], codes: Mapping[str, Quantized]
) -> Iterator[tuple[str, Tensor, Quantized | None]]:
    """All tensors under their names in GGUF, with their codes where there are any, one block in memory at a time."""
    network: Any = model.network
    factors = _rotary_factors(model)
    yield "token_embd.weight", network.get_input_embeddings().weight.detach(), None
    yield "output_norm.weight", network.model.norm.weight.detach(), None
    if not model.config.tie_word_embeddings:
        yield "output.weight", network.get_output_embeddings().weight.detach(), None
    if factors is not None:
        yield "rope_freqs.weight", factors, None
    width = model.config.hidden_size
    for number, shape in enumerate(shapes):
        with model.opened(shape.block) as block:
            state = {path: tensor.detach().clone() for path, tensor in block.module.state_dict().items()}
        if shape.ffn == ZEROS and "mlp.gate_proj.weight" not in state:
            for name, size in (("gate", (ZEROS, width)), ("up", (ZEROS, width)), ("down", (width, ZEROS))):
                state[f"mlp.{name}_proj.weight"] = torch.zeros(size)
        for path, name in NAMES.items():
            there = shape.heads if name.startswith("attn") else shape.ffn
            if there:
                tensor, quantized = state[f"{path}.weight"], codes.get(f"{model.family.blocks}.{shape.block}.{path}")
                if name in ("attn_q", "attn_k"):
                    heads = shape.heads if name == "attn_q" else shape.groups
                    tensor = _interleaved(tensor, heads)
                    if quantized is not None:
                        turned, steps = (_interleaved(each, heads) for each in (quantized.codes, quantized.steps))
                        quantized = Quantized(turned, steps, None, quantized.grid)
                yield f"blk.{number}.{name}.weight", tensor, quantized


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, [heads · P, D], or their steps, with the two halves of every head in turns."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _rotary_factors(model: BlockModel) -> Tensor | None:
    """What the frequencies of the rotary table are divided by, [P/2]; None if by nothing.

    Raises:
        Problem: If the table also scales the attention, or depends on the length.
    """
    rotary: Any = model.network.model.rotary_emb  # type: ignore[union-attr]
    parameters, head = model.config.rope_parameters, model.sizes(0).head
    if rotary.attention_scaling != 1 or parameters["rope_type"] in ("dynamic", "longrope", "yarn"):
        raise Problem(
            f"The rotary table `{parameters['rope_type']}` cannot be written as GGUF.",
            why="it scales the attention or depends on the length of the text.",
            fix="a model with the table `default`, `linear` or `llama3`.",
            code=Exit.INCOMPATIBLE,
        )
    plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    factors = (plain / rotary.inv_freq.double().cpu()).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def _packed(tensor: Tensor, kind: Type) -> tuple[np.ndarray, Any]:
    """The values as the file holds them, and their type if the array does not say it."""
    import gguf

    values = tensor.float().cpu().numpy()
    if tensor.ndim == 1 or kind == "f32" or (kind == "q8_0" and values.shape[-1] % 32):
        return values, None
    if kind == "f16":
        return values.astype(np.float16), None
    named = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[kind]
    return gguf.quants.quantize(values, named), named


def _read_back(file: Path, expected: Iterable[tuple[str, Tensor, Quantized | None]], kind: Type) -> tuple[int, float]:
    """How many tensors there are, and the largest difference of an entry, relative to the largest of its tensor.

    Raises:
        Problem: If a tensor differs by more than its type rounds; those with codes by none.
    """
    import gguf

    rounds, count, worst = {"f32": 0.0, "f16": 2**-10, "bf16": 2**-8, "q8_0": 2**-7}[kind], 0, 0.0
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, stored, quantized in expected:
        tensor, allowed = (stored, rounds) if quantized is None else (quantized.weight(), 0.0)
        values = gguf.quants.dequantize(found[name].data, found[name].tensor_type).reshape(tensor.shape)
        error = float(np.abs(values - tensor.float().cpu().numpy()).max()) / (float(tensor.abs().max()) or 1.0)
        if error > allowed:
            raise Problem(
                f"{name} does not come back from the GGUF file: it differs by {error:.2g} of its largest entry.",
                why=f"it may round by at most {allowed:.2g}.",
                fix="`--type f32`; if that fails too, please report it.",
                code=Exit.CHECK_FAILED,
            )
        count, worst = count + 1, max(worst, error)
    return count, worst


def _write_tokenizer(writer: Any, folder: Path) -> None:
    """The tokenizer, if it is byte-level BPE with a split that llama.cpp knows.

    Raises:
        Problem: If it is another one.
    """
    import gguf
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    split = _split_name(found.get("pre_tokenizer"))
    if found.get("model", {}).get("type") != "BPE" or found.get("normalizer") or split is None:
        raise Problem(
            f"The tokenizer of {folder} cannot be written as GGUF.",
            why="only byte-level BPE whose splitting of text llama.cpp has a name for (GPT-2, SmolLM, Llama 3) can.",
            fix="llama.cpp's own converter for the dense model, whose tokenizer keys fit the cut one too.",
            code=Exit.INCOMPATIBLE,
        )
    vocabulary = dict(found["model"]["vocab"])
    added = {item["id"]: item for item in found["added_tokens"]}
    words = {number: word for word, number in vocabulary.items()} | {number: item["content"] for number, item in added.items()}
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(
        [
            (kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED) if number in added
            else kinds.NORMAL if number in words else kinds.UNUSED
            for number in range(size)
        ]
    )  # fmt: skip
    merges = found["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    writer.add_token_merges(merges or ["\u0100 \u0100"])  # llama.cpp wants one; it leads to no token
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id), (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id), (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):  # fmt: skip
        if number is not None:
            add(number)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _split_name(found: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for a way to split text before BPE."""
    steps = (found or {}).get("pretokenizers", [found] if found else [])
    kinds = [step["type"] for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return "llama-bpe" if steps[0]["pattern"].get("Regex") == SPLIT_LLAMA3 else None
    return None
