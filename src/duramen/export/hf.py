"""A Hugging Face folder from finished blocks: shards, everything else of the source byte for byte, masks, and a check.

The first shard holds what lies outside the blocks, as the source stores it; then comes one shard per block. A tensor that no
table knows is copied and listed. The folder is reopened by plain transformers in a fresh object, and its logits are compared
with those of the model that was edited.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from duramen.calibrate.walker import Reshape
from duramen.export.codes import write_codes
from duramen.families.checkpoint import INDEX, Checkpoint
from duramen.families.model import BlockModel
from duramen.opening import load, open_blocks, runs_plainly
from duramen.problem import Exit, Problem
from duramen.reading import reading
from duramen.rundir import (
    CODES,
    FORMATS,
    MASKS,
    BlockStore,
    read_formats,
    unpack_mask,
    visible_files,
    write_json,
    write_tensors,
    write_text,
)

TOLERANCE = 1e-3
"""Largest difference of logits after reopening, relative to the largest logit."""
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".h5", ".msgpack", ".onnx", ".gguf")
"""Ends of the names of files with weights. Those of the source in other forms, as Mistral's consolidated ones, would be taken for the result by programs that look for them first."""
_OWN = {
    INDEX,
    FORMATS,
    "manifest.json",
    "results.json",
    "recipe.yaml",
    "recipe.lock.yaml",
    "log.jsonl",
    "report.html",
    "README.md",
}


def assemble(
    source: Checkpoint,
    store: BlockStore,
    num_blocks: int,
    folder: Path,
    reshape: Reshape | None = None,
    files: Mapping[str, str | Path] | None = None,
    replaced: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Writes the model folder of one finished step.

    Args:
        source: The folder that the step started from.
        store: Finished blocks.
        num_blocks: Number of blocks.
        folder: Where to write; whole files are left as they are.
        reshape: What else becomes of the blocks.
        files: What else goes beside the weights: name -> content, or the file to take.
        replaced: Tensors outside the blocks that are not those of the source, by stored name.

    Returns:
        Names of the tensors outside the blocks, copied as they were.
    """
    kept = reshape.blocks if reshape else list(range(num_blocks))
    count = len(kept) + 1
    shards = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    places: dict[str, str] = {}
    for number, index in enumerate(kept):
        if reshape is None:
            names = list(store.names(index))
            _link(store.shard(index), folder / shards[number + 1])
        else:
            tensors = _reshaped(store, reshape, index, number)
            names = list(tensors)
            write_tensors(folder / shards[number + 1], tensors)
        places |= dict.fromkeys(names, shards[number + 1])
    inside = {name for index in range(num_blocks) for name in store.names(index)}
    replaced = replaced or {}
    outside = [name for name in source.names if name not in inside and name not in replaced]
    renamed = {name: reshape.stored_name(name) if reshape else name for name in (*outside, *replaced)}
    write_tensors(
        folder / shards[0],
        {renamed[name]: source.read(name) for name in outside} | {renamed[name]: each for name, each in replaced.items()},
    )
    places |= dict.fromkeys(renamed.values(), shards[0])
    size = sum((folder / shard).stat().st_size for shard in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})
    _write_masks(source.folder, store, num_blocks, folder, reshape)
    write_codes(source.folder, store, num_blocks, folder, shapes_stay=reshape is None)
    copy_other_files(source.folder, folder)
    if reshape:
        write_json(folder / "config.json", reshape.config)
    _add(folder, {**(reshape.files if reshape else {}), **(files or {})})
    return outside


def _reshaped(store: BlockStore, reshape: Reshape, index: int, number: int) -> dict[str, Tensor]:
    """What stays of block ``index``, by the stored names that it has as block ``number``."""
    tensors, names = load_file(store.shard(index)), store.names(index)
    paths = {own.partition(f".{index}.")[2]: stored for stored, own in names.items()}
    kept = reshape.block(index, {path: tensors[stored] for path, stored in paths.items()})
    moved = {path: re.sub(rf"(^|\.){index}\.", rf"\g<1>{number}.", stored, count=1) for path, stored in paths.items()}
    return {reshape.stored_name(moved[path]): tensor for path, tensor in kept.items()}


def _write_masks(source: Path, store: BlockStore, num_blocks: int, folder: Path, reshape: Reshape | None) -> None:
    """All masks in one file, bit-packed; masks of earlier steps stay unless this step replaced them."""
    masks: dict[str, Tensor] = load_file(source / MASKS) if (source / MASKS).is_file() else {}
    for index in range(num_blocks):
        masks |= load_file(store.masks(index))
    masks = reshape.masks(masks) if reshape else masks
    if masks:
        layout = "uint8 [O, ceil(I/8)], little-endian bits, 1 where a weight was removed"
        write_tensors(folder / MASKS, masks, ("layout", layout))


def copy_other_files(source: Path, folder: Path, *, but: tuple[str, ...] = ()) -> None:
    """Copies config, tokenizer and whatever else belongs to the source, byte for byte; weights, run files and those of ``but`` stay behind."""
    for file in sorted(source.iterdir()):
        weights = file.suffix in WEIGHTS or file.name in ("params.json", "pytorch_model.bin.index.json")
        if file.is_file() and not weights and file.name not in (*_OWN, *but) and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def annotate(source: Path, folder: Path, files: Mapping[str, str | Path]) -> None:
    """Writes the model folder of a step that changes no weight: a copy of the source, and these files, name -> content or the file to take."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_other_files(source, folder)
    for file in source.iterdir():
        if file.name in (INDEX, MASKS, CODES, FORMATS) or (file.name.startswith("model") and file.suffix == ".safetensors"):
            shutil.copyfile(file, folder / file.name)
    _add(folder, files)


def _add(folder: Path, files: Mapping[str, str | Path]) -> None:
    for name, content in files.items():
        if isinstance(content, Path):
            _link(content, folder / name)
        else:
            write_text(folder / name, content)


def publish(step: Path, out: Path) -> None:
    """Links the finished folder of the last step into OUT."""
    for name, file in visible_files(step).items():
        _link(file, out / name)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@torch.no_grad()
def verify_logits(
    folder: Path, model: BlockModel, hidden: Tensor, tokens: Tensor, *, whole_up_to: int, last: int = 256
) -> dict[str, Any]:
    """Reopens a folder in a fresh object and compares its logits with the edited model's.

    Where inputs are rounded, the last digit of a sum decides between codes, and a batch of another size may have another one: the whole batch runs again then.

    Args:
        folder: The folder that was written.
        model: The model that was edited.
        hidden: Its hidden states after the last block, [B, T, D].
        tokens: The token ids behind them, [B, T]; those of the first sequence are compared.
        whole_up_to: Weight bytes up to which the folder is loaded whole; a larger one is streamed.
        last: How many tokens at the end are compared.

    Returns:
        ``{"how", "largest_difference", "largest_logit"}``.

    Raises:
        Problem: If the logits differ.
    """
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    expected = model.logits(hidden[:1, -last:])
    batch = tokens if any(each.runs for each in read_formats(folder).values()) else tokens[:1]
    if size <= whole_up_to:
        reopened = load(folder, dtype=model.dtype).to(model.device)
        how = "plain transformers, whole" if runs_plainly(folder) else "duramen.load, whole"
        keep = {"logits_to_keep": last} if "logits_to_keep" in signature(reopened.forward).parameters else {}
        found = reopened(batch.to(model.device), use_cache=False, **keep).logits[:1, -last:]
    else:
        how, found = "streamed, block by block", _streamed_logits(folder, model, batch, last)
    difference = float((found.float() - expected.float()).abs().max())
    scale = float(expected.abs().max())
    limit = TOLERANCE if model.dtype == torch.float32 else 0.1
    if not difference <= limit * scale:
        raise Problem(
            f"{folder} was reopened and its logits differ by {difference:.3g} (largest logit {scale:.3g}).",
            why="the saved folder is not the model that was edited.",
            fix="please report this with the model's name; the finished blocks are kept.",
            code=Exit.CHECK_FAILED,
        )
    return {"how": how, "largest_difference": difference, "largest_logit": scale}


def _streamed_logits(folder: Path, model: BlockModel, tokens: Tensor, last: int) -> Tensor:
    generic = model.family.name == "generic"
    fresh = open_blocks(folder, dtype=model.dtype, device=model.device, allow_generic=generic)
    (hidden,) = fresh.last_hidden([tokens], [[tokens.shape[1]] * len(tokens)])
    return fresh.logits(hidden[:1, -last:])


def check_masks(model: BlockModel) -> dict[str, Any] | None:
    """Counts removed weights by the mask file, and names the layers in which a removed weight is not zero; None without one."""
    assert model.checkpoint is not None
    file = model.checkpoint.folder / MASKS
    if not file.is_file():
        return None
    removed, size, broken = 0, 0, []
    with reading(file):
        masks = load_file(file)
    for name, packed in masks.items():
        with reading(file):
            stored = model.checkpoint.read(model.stored_name(f"{name}.weight"))
            weight = stored.T if model.transposed(name) else stored
            pruned = unpack_mask(packed, weight.shape[1])
            assert pruned.shape == weight.shape, f"a mask of {tuple(pruned.shape)} for {name} of {tuple(weight.shape)}"
        removed, size = removed + int(pruned.sum()), size + pruned.numel()
        if bool((weight[pruned] != 0).any()):
            broken.append(name)
    return {"removed": removed, "size": size, "broken": broken}
