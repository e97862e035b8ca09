"""Adapters in PEFT's folder format, written and read without PEFT.

Engines read the scale of an adapter differently: some know α/r only, whatever the config says. So the default form is *portable*: plain LoRA with
α = r, whose scale is 1, and γ folded into B. The other form, ``rslora``, keeps α and B for further training, which folding would change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from duramen.problem import Exit, Problem
from duramen.reading import read_json, reading
from duramen.recover.adapters import Adapter
from duramen.recover.scaling import scale
from duramen.rundir import write_json, write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KNOWN = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "use_rslora", "target_modules",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "lora_dropout", "init_lora_weights",
}  # fmt: skip
HARMLESS = {"qalora_group_size", "peft_version", "auto_mapping", "revision", "megatron_core"}
"""Entries that say nothing by themselves."""
PLAIN = (None, True, False, "gaussian", "kaiming")
"""Starts that leave the base as it is."""
Form = Literal["portable", "rslora"]


@dataclass(frozen=True)
class Change:
    """The change γBA of one layer: A [r, I], B [O, r], γ."""

    a: Tensor
    b: Tensor
    gamma: float


def write_peft(folder: Path, adapters: Mapping[str, Adapter], *, alpha: float, form: Form = "portable", base: str = "") -> None:
    """Writes adapters that PEFT loads with equal output.

    Args:
        folder: Where to.
        adapters: By the layers' full names.
        alpha: α, for ``rslora``, where γ = α/√r.
        form: See above.
        base: Name of the model that they belong to.

    Raises:
        Problem: If an adapter is more than a low-rank change, or ``rslora`` would mean another γ.
    """
    check_alone(adapters)
    factors = {name: _factors(adapter) for name, adapter in adapters.items()}
    ranks = {len(a) for a, _ in factors.values()}
    if len(ranks) != 1:
        raise Problem(
            f"The adapters have ranks {sorted(ranks)}.", why="one folder has one rank.", fix="`duramen.recover.merge.resize`."
        )
    (rank,) = ranks
    if form == "rslora" and any(
        each.start or abs(each.gamma - scale(alpha, rank)) > 1e-9 * each.gamma for each in adapters.values()
    ):
        raise Problem(
            "These adapters cannot be written as `rslora`.",
            why="their strength is not α/√r, or what they began with is taken off.",
            fix="the form `portable`.",
        )
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b * (1.0 if form == "rslora" else adapters[name].gamma)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": rank,
            "lora_alpha": alpha if form == "rslora" else rank, "use_rslora": form == "rslora", "target_modules": sorted(adapters),
            "rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "lora_dropout": 0.0,
            "fan_in_fan_out": any(adapter.transposed for adapter in adapters.values()), "init_lora_weights": True,
        },
    )  # fmt: skip


def check_alone(adapters: Mapping[str, Adapter]) -> None:
    """Stops on an adapter that is more than a low-rank change."""
    for name, adapter in adapters.items():
        if adapter.mode != "side" or adapter.length is not None:
            kind = "row lengths" if adapter.length is not None else f"the mode {adapter.mode}"
            raise Problem(
                f"The adapter of {name} cannot be written on its own: it has {kind}.",
                why="its change is not of low rank, and other programs would apply it without the mask.",
                fix="the merged model, which keeps every zero.",
                code=Exit.INCOMPATIBLE,
            )


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A and B in float32, with what they began with, if that is taken off: [A, A₀] and [B, −B₀]."""
    a, b = adapter.a.detach().float(), adapter.b.detach().float()
    return (a, b) if adapter.start is None else (torch.cat([a, adapter.start[0]]), torch.cat([b, -adapter.start[1]], 1))


def read_peft(folder: Path) -> dict[str, Change]:
    """Reads what PEFT or ``write_peft`` has written; by the layers' full names.

    Raises:
        Problem: If it is no such folder, or holds more than low-rank changes.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise Problem(
            f"{folder} is no adapter in PEFT's format.", why="a file is missing.", fix=f"a folder with {CONFIG} and {WEIGHTS}."
        )
    config = read_json(folder / CONFIG)
    with reading(folder / WEIGHTS):
        tensors = load_file(folder / WEIGHTS)
    odd = [key for key, value in config.items() if key not in KNOWN | HARMLESS and value not in (None, False, [], {}, "", 0)]
    odd += [
        key
        for key, fine in (("peft_type", ("LORA",)), ("bias", ("none",)), ("init_lora_weights", PLAIN))
        if config.get(key) not in fine
    ]
    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    expected = {f"{PREFIX}{name}.lora_{half}.weight" for name in names for half in "AB"}
    odd += sorted(expected ^ tensors.keys())
    if odd or "lora_alpha" not in config or any(tensor.ndim != 2 for tensor in tensors.values()):
        raise Problem(
            f"The adapter {folder} holds more or less than low-rank changes: {', '.join(odd[:5]) or 'no lora_alpha'}.",
            why="what it means cannot be kept.",
            fix="merge it by PEFT, and go on with the merged model.",
            code=Exit.INCOMPATIBLE,
        )
    found = {}
    rule: Any = "alpha_over_sqrt_r" if config.get("use_rslora") else "alpha_over_r"
    for name in names:
        a, b = (tensors[f"{PREFIX}{name}.lora_{half}.weight"] for half in "AB")
        with reading(folder / CONFIG):
            alpha = float(_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"]))
        found[name] = Change(a, b, scale(alpha, len(a), rule))
    return found


def _pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of a layer: of the first entry that matches its name or the end of it, as PEFT reads them, or the default."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def delta(change: Change) -> Tensor:
    """γBA, [O, I]."""
    return torch.as_tensor(change.gamma * (change.b.float() @ change.a.float()))
