"""ONNX, for ONNX Runtime: the model as a graph by the builder of ONNX Runtime GenAI, its coded layers as ``MatMulNBits`` with the codes that they have.

The builder would choose codes anew; it keeps those of a checkpoint in Olive's layout, and so one is written for it. A step that a row or a wide group shares is repeated for every block.
A tied embedding goes into the file twice: the builder shares it only where no layer has codes.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import Tensor

from duramen.export.engine import hold_against, run_or_said, run_program
from duramen.export.packed import check_empty, common_group, container, pack_bytes, unsigned, write_packed
from duramen.families import OWN
from duramen.families.checkpoint import Checkpoint
from duramen.families.model import BlockModel
from duramen.grids import Inputs, Quantized
from duramen.problem import Exit, Problem, need
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
    need("ONNX", "onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir", install="onnxruntime-genai onnxruntime onnx onnx-ir")
    check_empty(out)
    if str(Checkpoint(folder).config["model_type"]).startswith(OWN):
        raise Problem(
            f"The blocks of {folder.name} differ in shape, and ONNX Runtime GenAI builds models whose blocks are alike.", why="widths follow scores or a search, block by block.",
            fix="`allocation: local` in the step that cuts, which gives all blocks one shape; GGUF and transformers take models of any shapes.", code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    codes = read_codes(folder)
    rounds = any(each.inputs for each in read_formats(folder).values())
    chosen = ("int8" if rounds and codes else "float") if kind == "auto" else kind
    with TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as place:
        source = Path(place) / "olive"
        blocks = write_olive(folder, source, codes) if codes else {}
        level = 4 if chosen == "int8" else 1
        run_program(
            [
                "-m", "onnxruntime_genai.models.builder", "-i", str(source if codes else folder), "-o", str(out), "-p", "int4" if codes else "fp32", "-e", "cpu",
                "-c", str(Path(place) / "cache"), "--extra_options", f"accuracy_level={level}", "nodes_to_exclude=/lm_head/MatMul", *["shared_embeddings=false"] * bool(codes),
            ],
            f"ONNX Runtime GenAI does not build a model of {folder}",
        )  # fmt: skip
    found = {"bytes": sum(file.stat().st_size for file in out.glob("model.onnx*")), "coded": len(codes), "type": chosen}
    inputs = {name: Inputs(8, width) for name, width in blocks.items()} if chosen == "int8" else {}
    return found | {"ran": {"ONNX Runtime": run_or_said(lambda: _checked(folder, out, inputs))}}


def write_olive(folder: Path, out: Path, codes: dict[str, Quantized]) -> dict[str, int]:
    """Writes a folder in Olive's layout: for every layer ``qweight`` [O, I·b/8] and ``qzeros`` [O, I/g·b/8] in bytes, the first code in the lowest bits, and ``scales`` [O, I/g].

    Returns:
        The width g of every layer's blocks.

    Raises:
        Problem: If a layer has no codes, or what shares a step is no multiple of a block.
    """
    model = BlockModel.from_folder(folder)
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
    first = next(iter(layers.values()))
    write_packed(model, out, tensors, codes, {"quant_method": "olive", "symmetric": False, "overrides": layers, **first})
    return {name: each["group_size"] for name, each in layers.items()}


def olive_tensors(quantized: Quantized, bits: int, group: int) -> dict[str, Tensor]:
    """The tensors of one layer in Olive's layout."""
    counted, zeros = unsigned(quantized, bits)
    times = quantized.codes.shape[1] // group // quantized.steps.shape[1]
    steps, zeros = (each.repeat_interleave(times, 1) for each in (quantized.steps, zeros))
    return {"qweight": pack_bytes(counted, bits), "qzeros": pack_bytes(zeros, bits), "scales": steps.float()}


def _checked(folder: Path, out: Path, inputs: dict[str, Inputs]) -> dict[str, Any]:
    """Runs what was written, and holds it against transformers."""
    found = hold_against("onnx_genai", out, folder, inputs=inputs)
    if not found["largest_difference"] <= (ROUNDED if inputs else EXACT) * found["largest_logit"]:
        raise Problem(
            f"ONNX Runtime's logits differ by {found['largest_difference']:.3g} from those of {folder} (largest logit {found['largest_logit']:.3g}).",
            why="the graph is not this model.",
            fix="please report it, with the config of the model; the file is kept.",
            code=Exit.CHECK_FAILED,
        )
    return found
