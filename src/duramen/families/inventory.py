"""What a model holds: roles, shapes, stored types, zeros; read tensor by tensor, so that any size fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from math import prod
from typing import Any

from torch import Tensor

from duramen.families.model import BlockModel
from duramen.finite import all_finite

PATTERNS = ((1, 4), (2, 4), (4, 8))
"""N:M patterns that are looked for, the sparsest first."""


def inventory(model: BlockModel) -> dict[str, Any]:
    """Counts what a checkpoint holds.

    Returns:
        ``family, model_type, blocks, sizes, parameters, bytes, formats`` (stored type -> parameters), ``roles`` (one entry per
        role and shape, with its zeros and N:M pattern), ``layers`` (the same for every layer by name), ``outside`` (tensors outside the blocks), ``damaged`` (tensors that
        are not finite).
    """
    assert model.checkpoint is not None
    described = model.checkpoint.describe()
    formats: Counter[str] = Counter()
    for kind, shape in described.values():
        formats[kind] += prod(shape)
    names = {model.stored_name(f"{name}.weight"): (name, role) for name, (role, _) in model.layer_names().items()}
    prefix = _block_prefix(next(iter(names)), model)
    layers: dict[str, dict[str, Any]] = {}
    damaged = []
    for name in described:
        tensor = model.checkpoint.read(name)
        if tensor.is_floating_point() and not all_finite(tensor):
            damaged.append(name)
        if name in names:
            layer, role = names[name]
            layers[layer] = {"layer": layer, "role": role} | _sparsity(tensor.T if model.transposed(layer) else tensor)
    return {
        "model_type": model.checkpoint.config.get("model_type", "?"),
        "family": model.family.name,
        "blocks": len(model.blocks),
        "sizes": asdict(model.sizes(0)) if model.family.groups else {},
        "parameters": sum(formats.values()),
        "bytes": sum(file.stat().st_size for file in model.checkpoint.folder.glob("model*.safetensors")),
        "formats": dict(formats),
        "roles": _by_role(layers[name] for name in model.layer_names()),
        "layers": [layers[name] for name in model.layer_names()],
        "outside": [name for name in described if not name.startswith(prefix)],
        "damaged": damaged,
    }


def _block_prefix(stored: str, model: BlockModel) -> str:
    """How the names of block tensors begin in this checkpoint."""
    short = model.family.blocks.split(".", 1)[-1]
    return stored[: stored.index(short)] + short + "."


def _sparsity(weight: Tensor) -> dict[str, Any]:
    """Shape, zeros, their share, and the N:M pattern of one weight, [O, I]."""
    zeros = int((weight == 0).sum())
    return {
        "shape": list(weight.shape), "parameters": weight.numel(), "zeros": zeros,
        "share": zeros / weight.numel(), "pattern": find_pattern(weight),
    }  # fmt: skip


def _by_role(layers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per role and shape, in order; its pattern is None where its layers differ."""
    roles: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in layers:
        empty = {
            "role": item["role"],
            "shape": item["shape"],
            "layers": 0,
            "parameters": 0,
            "zeros": 0,
            "pattern": item["pattern"],
        }
        entry = roles.setdefault((item["role"], *item["shape"]), empty)
        entry["pattern"] = entry["pattern"] if entry["pattern"] == item["pattern"] else None
        entry["layers"] += 1
        entry["parameters"] += item["parameters"]
        entry["zeros"] += item["zeros"]
        entry["share"] = entry["zeros"] / entry["parameters"]
    return list(roles.values())


def find_pattern(weight: Tensor) -> str | None:
    """The sparsest known ``kept:group`` pattern that every group of inputs obeys, or None; weight [O, I]."""
    for kept, group in PATTERNS:
        whole = weight.shape[1] - weight.shape[1] % group
        if whole and int((weight[:, :whole] != 0).reshape(-1, group).sum(1).max()) <= kept:
            return f"{kept}:{group}"
    return None
