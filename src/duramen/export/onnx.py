"""ONNX, for ONNX Runtime: the model as a graph by the builder of ONNX Runtime GenAI, its coded layers as ``MatMulNBits`` with the codes that they have.

The builder would choose codes anew; it keeps those of a checkpoint in Olive's layout, and so one is written for it. A step that a row or a wide group shares is repeated for every block.
A tied embedding goes into the file twice: the builder shares it only where no layer has codes.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from duramen.export.engine import PROMPTS, compare, run_engine, run_program, speeds
from duramen.export.hf import copy_other_files
from duramen.export.packed import common_group, container, pack_bytes, unsigned
from duramen.families.model import BlockModel
from duramen.grids import Format, Inputs, Quantized
from duramen.problem import Exit, Problem
from duramen.rounding import start_rounding
from duramen.rundir import read_codes, read_formats

Type = Literal["auto", "float", "int8"]
BLOCKS = (16, 32, 64, 128, 256)
"""Widths of blocks that the engine knows."""
EXACT = 1e-3
"""Largest difference of logits, relative to the largest, where inputs stay in float."""
ROUNDED = 0.1
"""The same where they are rounded; a code that falls the other way is felt by all that follows."""


def export_onnx(folder: Path, out: Path, *, kind: Type = "auto") -> dict[str, Any]:
    """Writes a model folder for ONNX Runtime GenAI, and runs it there.

    Args:
        folder: A Hugging Face folder.
        out: The folder to write; it must not be there, or be empty.
        kind: What coded layers multiply with: inputs in ``float``, or rounded to ``int8`` by the engine, block by block; ``auto`` rounds where the folder's formats do.

    Returns:
        ``bytes``; how many layers are ``coded``; ``type``; and what the engine said when it ``ran``, see ``duramen.export.engine``.

    Raises:
        Problem: If the packages are missing, the architecture has no builder, a grid has no counterpart, or the engine says something else than transformers.
    """
    _check_packages()
    if out.exists() and any(out.iterdir()):
        raise Problem(f"{out} is not empty.", why="an export is never mixed with other files.", fix="another folder.")
    codes = read_codes(folder)
    rounds = any(each.inputs for each in read_formats(folder).values())
    chosen = ("int8" if rounds and codes else "float") if kind == "auto" else kind
    with TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as place:
        source = Path(place) / "olive"
        if codes:
            write_olive(folder, source, codes)
        level = 4 if chosen == "int8" else 1
        run_program(
            [
                "-m", "onnxruntime_genai.models.builder", "-i", str(source if codes else folder), "-o", str(out), "-p", "int4" if codes else "fp32", "-e", "cpu",
                "-c", str(Path(place) / "cache"), "--extra_options", f"accuracy_level={level}", "nodes_to_exclude=/lm_head/MatMul", *["shared_embeddings=false"] * bool(codes),
            ],
            f"ONNX Runtime GenAI does not build a model of {folder}",
        )  # fmt: skip
    found = {"bytes": sum(file.stat().st_size for file in out.glob("model.onnx*")), "coded": len(codes), "type": chosen}
    blocks = {name: common_group(each, BLOCKS) for name, each in codes.items()} if chosen == "int8" else {}
    return found | {"ran": _checked(folder, out, blocks)}


def write_olive(folder: Path, out: Path, codes: dict[str, Quantized]) -> None:
    """Writes a folder in Olive's layout: for every layer ``qweight`` [O, I·b/8] and ``qzeros`` [O, I/g·b/8] in bytes, the first code in the lowest bits, and ``scales`` [O, I/g].

    Raises:
        Problem: If a layer has no codes, or what shares a step is no multiple of a block.
    """
    model = BlockModel.from_folder(folder)
    assert model.checkpoint is not None
    without = sorted(set(model.layer_names()) - codes.keys())
    if without:
        raise Problem(
            f"{len(without)} layers have no codes, {without[0]} the first.",
            why="the builder of ONNX Runtime GenAI takes codes of all layers, or of none.",
            fix="eight bits for them: a step `rtn` with `format: W8 g32` and `only` these.",
            code=Exit.INCOMPATIBLE,
        )
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, int]] = {}
    for name, quantized in codes.items():
        bits, group = container(quantized), common_group(quantized, BLOCKS)
        if group is None or model.transposed(name):
            raise Problem(
                f"{name} cannot be written with its codes: {quantized.codes.shape[1] // quantized.steps.shape[1]} inputs share a step.",
                why=f"ONNX Runtime knows blocks of {', '.join(map(str, BLOCKS))}, of weights that are stored by outputs.",
                fix="a format whose groups are multiples of 16.",
                code=Exit.INCOMPATIBLE,
            )
        tensors |= {f"{name}.{end}": tensor for end, tensor in olive_tensors(quantized, bits, group).items()}
        layers[name] = {"bits": bits, "group_size": group}
    stored = {model.stored_name(f"{name}.weight") for name in codes}
    tensors |= {name: model.checkpoint.read(name) for name in model.checkpoint.names if name not in stored}
    out.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    config = model.checkpoint.config | {
        "quantization_config": {"quant_method": "olive", "symmetric": False, "overrides": layers, **next(iter(layers.values()))}
    }
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    copy_other_files(folder, out, but=("config.json",))


def olive_tensors(quantized: Quantized, bits: int, group: int) -> dict[str, Tensor]:
    """The tensors of one layer in Olive's layout."""
    counted, zeros = unsigned(quantized, bits)
    times = quantized.codes.shape[1] // group // quantized.steps.shape[1]
    steps, zeros = (each.repeat_interleave(times, 1) for each in (quantized.steps, zeros))
    return {"qweight": pack_bytes(counted, bits), "qzeros": pack_bytes(zeros, bits), "scales": steps.float()}


def _check_packages() -> None:
    missing = [name for name in ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir") if find_spec(name) is None]
    if missing:
        raise Problem(
            f"ONNX needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed.",
            why="they are an extra.",
            fix="`python -m pip install onnxruntime-genai onnxruntime onnx onnx-ir`",
        )


def _checked(folder: Path, out: Path, blocks: dict[str, int | None]) -> dict[str, Any]:
    """Runs what was written, and holds it against transformers, which rounds inputs to eight bits in the same ``blocks``, where the engine does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(each)["input_ids"] for each in PROMPTS]
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start_rounding(network, {name: Format(inputs=Inputs(8, width)) for name, width in blocks.items()})
    ran = run_engine("onnx_genai", out, prompts, network.config.vocab_size)
    found = compare(network, prompts, ran)
    limit = ROUNDED if blocks else EXACT
    if not found["largest_difference"] <= limit * found["largest_logit"]:
        raise Problem(
            f"ONNX Runtime's logits differ by {found['largest_difference']:.3g} from those of {folder} (largest logit {found['largest_logit']:.3g}).",
            why="the graph is not this model.",
            fix="please report it, with the config of the model; the file is kept.",
            code=Exit.CHECK_FAILED,
        )
    return found | speeds(ran)
