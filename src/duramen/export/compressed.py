"""Compressed-tensors: codes, packed, in the place of weights, as vLLM and transformers read them.

Codes of up to four bits stand in four (``pack-quantized``), others in eight; where inputs are rounded to eight bits too, weights of eight are plain integers (``int-quantized``), which vLLM
multiplies as such. Inputs of eight bits are declared as rounded token by token. Keys and values are a setting of the engine.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duramen.export.engine import PROMPTS
from duramen.export.packed import check_empty, container, pack_words, unsigned, write_packed
from duramen.families.model import BlockModel
from duramen.grids import Format, Quantized
from duramen.problem import Exit, Problem
from duramen.rounding import start_rounding
from duramen.rundir import read_codes, read_formats

EXACT = 1e-4
"""Largest difference of logits, relative to the largest, where inputs stay in float; eight bits of inputs get a step from 127.5, not 127, there."""
ROUNDED = 5e-2


def export_compressed(folder: Path, out: Path) -> dict[str, Any]:
    """Writes a model folder in the layout of compressed-tensors, and opens it by plain transformers, where that package is installed.

    Args:
        folder: A Hugging Face folder of which some layers were rounded.
        out: The folder to write; it must not be there, or be empty.

    Returns:
        ``bytes``; how many layers are ``coded``; the ``layouts``; ``largest_difference`` of the logits after opening and the ``largest_logit``, both None if it was not opened.

    Raises:
        Problem: If nothing was rounded, a grid or input has no counterpart, or what is opened is another model.
    """
    check_empty(out)
    codes, formats = read_codes(folder), read_formats(folder)
    if not codes:
        raise Problem(f"{folder} has no codes.", why="no step has rounded its weights.", fix="a step `gptq` or `qat`.")
    model = BlockModel.from_folder(folder)
    tensors: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, quantized in codes.items():
        if model.transposed(name):
            raise _no_counterpart(name, "its weight is stored by inputs")
        scheme = _scheme(name, quantized, formats[name])
        groups.setdefault(json.dumps(scheme), {**scheme, "targets": []})["targets"].append(name)
        tensors |= {
            f"{model.stored_name(f'{name}.weight').removesuffix('.weight')}.{end}": each
            for end, each in _tensors(quantized, scheme["format"]).items()
        }
    layouts = sorted({group["format"] for group in groups.values()})
    write_packed(model, out, tensors, codes, {
        "quant_method": "compressed-tensors", "format": layouts[0] if len(layouts) == 1 else "mixed-precision", "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups.values())},
        "ignore": sorted(name for name, module in model.network.named_modules() if isinstance(module, torch.nn.Linear) and name not in codes),
        "kv_cache_scheme": None, "global_compression_ratio": None,
    })  # fmt: skip
    found: dict[str, Any] = {
        "bytes": (out / "model.safetensors").stat().st_size, "coded": len(codes), "layouts": layouts, "largest_difference": None, "largest_logit": None, "ran": {},
    }  # fmt: skip
    return found | (_opened(folder, out) if find_spec("compressed_tensors") else {})


def _scheme(name: str, quantized: Quantized, wanted: Format) -> dict[str, Any]:
    """How one layer is declared."""
    bits, grid = container(quantized), quantized.grid
    if grid.affine:
        raise _no_counterpart(name, "its grid is affine, and transformers does not open packed codes of zero")
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": grid.share} if isinstance(grid.share, int) else {"strategy": "channel"}
    inputs = None
    if wanted.inputs:
        if wanted.inputs.bits != 8 or wanted.inputs.group:
            raise _no_counterpart(
                name, f"its inputs are rounded by {Format(inputs=wanted.inputs).text}, and only `A8` is executed"
            )
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    layout = "int-quantized" if bits == 8 and inputs else "pack-quantized"
    return {"format": layout, "weights": weights, "input_activations": inputs, "output_activations": None}


def _no_counterpart(name: str, why: str) -> Problem:
    return Problem(
        f"{name} cannot be written as compressed-tensors.",
        why=f"{why}.",
        fix="another format, or `skip` for such layers.",
        code=Exit.INCOMPATIBLE,
    )


def _tensors(quantized: Quantized, layout: str) -> dict[str, Tensor]:
    """Those of one layer."""
    bits = container(quantized)
    if layout == "int-quantized":
        return {"weight": quantized.codes, "weight_scale": quantized.steps}
    packed = pack_words(unsigned(quantized, bits)[0], bits)
    return {"weight_packed": packed, "weight_shape": torch.tensor(quantized.codes.shape), "weight_scale": quantized.steps}


@torch.no_grad()
def _opened(folder: Path, out: Path) -> dict[str, Any]:
    """What plain transformers makes of it, held against the model that rounds as measured."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(PROMPTS[0], return_tensors="pt").input_ids
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {name: Format(inputs=each.inputs) for name, each in read_formats(folder).items() if each.inputs}
    start_rounding(network, inputs)  # keys and values are the engine's own setting, so not here
    expected = network(ids, use_cache=False).logits
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(ids, use_cache=False).logits
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= (ROUNDED if inputs else EXACT) * largest:
        raise Problem(
            f"Plain transformers opened {out}, and its logits differ by {difference:.3g} (largest logit {largest:.3g}).",
            why="it is not the model that was exported.",
            fix="please report it, with the versions of transformers and compressed-tensors.",
            code=Exit.CHECK_FAILED,
        )
    return {"largest_difference": difference, "largest_logit": largest}
