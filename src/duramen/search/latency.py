"""Milliseconds of a prefill on this machine, module by module and level by level.

A module costs what its part of the block takes, at each of its widths, inside a stack of such blocks that is deep enough to fall out of
the processor's caches as a whole model does. Weights are constant: time depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import nn

from duramen.families import register_own
from duramen.families.model import BlockModel
from duramen.hardware.clock import now, prompt, repeated
from duramen.hardware.machine import free_memory
from duramen.problem import Exit, Problem
from duramen.search.database import Module
from duramen.shrink.groups import find_units
from duramen.shrink.plan import Plan, digest
from duramen.shrink.surgery import Surgery, part_children

DEPTH = 8
"""Blocks of a stack that is timed, at most."""
ROUNDS = 3
"""How often all is timed; of the medians of the rounds the least counts, since other work on a machine only ever adds."""
TURNS = 20
"""Prefills of each whole model, after one that warms up."""
STEADY = 0.5
"""How far the slowest round of the dense stack may be above the fastest."""
PARTS = ("attention", "mlp")


def prefill_costs(model: BlockModel, modules: Sequence[Module]) -> dict[str, Any]:
    """Times every level of every module; modules of the same kind and shape are timed once.

    Args:
        model: The dense model; only its config and shapes are used.
        modules: What the search may cut.

    Returns:
        ``rest``: milliseconds that no level changes; ``table``: of every level of every module; ``spread``: how far the slowest round of
        the dense stack was above the fastest.

    Raises:
        Problem: If the rounds differ too much.
    """
    keys = [(module.units.kind, module.units.sizes, module.units.count) for module in modules]
    alike = {key: [m for m, other in zip(modules, keys, strict=True) if other == key] for key in keys}
    wanted = [(key, kept) for key, (module, *_) in alike.items() for kept in module.grid if kept]
    rounds = []
    for _ in range(ROUNDS):
        whole = _stack(model, {}, list(range(len(model.blocks))))
        levels = []
        for key, kept in wanted:
            stack = _stack(model, {key[0]: kept} if kept < key[2] else {}, [module.units.block for module in alike[key]])
            levels.append(stack[alike[key][0].units.part])
        rounds.append((whole, levels))
    dense = {name: min(whole[name] for whole, _ in rounds) for name in rounds[0][0]}
    timed = {each: min(levels[number] for _, levels in rounds) for number, each in enumerate(wanted)}
    table = [
        _falling([timed[key, kept] if kept else 0.0 for kept in module.grid]) for key, module in zip(keys, modules, strict=True)
    ]
    covered = {(module.units.block, module.units.part) for module in modules}
    others = sum(
        dense[part]
        for block in range(len(model.blocks))
        for part in PARTS
        if (block, part) not in covered and part not in model.left(block)
    )
    around = dense["outside"] + len(model.blocks) * (dense["block"] - sum(dense[part] for part in PARTS))
    return {"rest": around + others, "table": table, "spread": _spread([whole["whole"] for whole, _ in rounds])}


def _falling(levels: list[float]) -> list[float]:
    """The same without dips: no level takes longer than a wider one, which could stand in for it."""
    return list(accumulate(reversed(levels), min))[::-1]


@torch.no_grad()
def prefills(surgeries: Mapping[str, Surgery]) -> dict[str, float]:
    """Milliseconds of a whole prefill by what each surgery leaves, with constant weights: the median of many, taken in turns.

    A machine that others use is now faster, now slower; taken in turns, all see the same. The models are in memory together; where they
    would take more than half of it, nothing is timed, and nothing returned.
    """
    sizes = [surgery.summary["parameters"]["after"] * surgery.model.dtype.itemsize for surgery in surgeries.values()]
    if sizes and 2 * sum(sizes) > free_memory(next(iter(surgeries.values())).model.device):
        return {}
    networks = {name: _empty(surgery) for name, surgery in surgeries.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(TURNS + 1):
        for name, network in networks.items():
            tokens, start = prompt(network.config.vocab_size).to(network.device), now()
            network(tokens, use_cache=False)
            seconds[name].append(now() - start)
    return {name: 1000 * median(found[1:]) for name, found in seconds.items()}


def _stack(model: BlockModel, widths: Mapping[str, int], blocks: Sequence[int]) -> dict[str, float]:
    """Milliseconds of a stack of the first of some blocks at one width: the whole, a block, its parts, and what is around the blocks."""
    blocks = blocks[:DEPTH]
    counts = {(units.kind, units.block): units.count for units in find_units(model, list(widths))}
    kept = {
        kind: tuple(tuple(range(min(width, counts[kind, block]))) for block in range(len(model.blocks)))
        for kind, width in widths.items()
    }
    dropped = tuple(index for index in range(len(model.blocks)) if index not in blocks)
    plan = Plan(digest(model), len(model.blocks), kept, dropped=dropped)
    surgery = Surgery(model, plan)
    network, tokens = _empty(surgery), prompt(surgery.config["vocab_size"]).to(model.device)
    times: dict[str, list[float]] = {name: [] for name in ("block", *PARTS)}
    with torch.no_grad(), _timed(network, model.family.blocks, surgery.base_type, times):
        whole = 1000 * median(repeated(lambda: network(tokens, use_cache=False)).tolist())
    found = {name: 1000 * median(seconds) for name, seconds in times.items()}
    return found | {"whole": whole, "outside": whole - len(blocks) * found["block"]}


def _spread(rounds: list[float]) -> float:
    """How far the slowest is above the fastest."""
    spread = max(rounds) / min(rounds) - 1
    if spread > STEADY:
        raise Problem(
            f"Prefills of the same stack take {min(rounds):.3g} to {max(rounds):.3g} ms here.",
            why="other programs use the machine, so that widths cannot be told apart by their time.",
            fix="leave the machine idle while `latency` is measured, or set a target for `macs` instead.",
            code=Exit.CHECK_FAILED,
        )
    return spread


def _empty(surgery: Surgery) -> Any:
    """What surgery leaves, with constant weights in the type of the forward passes."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(surgery.config)
    register_own(config["model_type"])
    with init_empty_weights():
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    dtype, device = surgery.model.dtype, surgery.model.device
    state = {name: torch.full(shape, 0.01, dtype=dtype, device=device) for name, shape in shapes.items()}
    network.load_state_dict(state, strict=False, assign=True)
    network.tie_weights()
    return network.to(device)


@contextmanager
def _timed(network: nn.Module, blocks: str, base: str, times: dict[str, list[float]]) -> Iterator[None]:
    """Notes the seconds of every block and of its parts."""
    handles = []

    def watch(part: str, first: nn.Module, last: nn.Module) -> None:
        begun: list[float] = []
        handles.append(first.register_forward_pre_hook(lambda *_: begun.append(now())))
        handles.append(last.register_forward_hook(_noting(times[part], begun)))

    for block in network.get_submodule(blocks):  # type: ignore[attr-defined]
        watch("block", block, block)
        for part in PARTS:
            children = [block.get_submodule(child) for child in part_children(base, part)]
            watch(part, children[0], children[-1])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noting(times: list[float], begun: list[float]) -> Callable[..., None]:
    def note(*_: Any) -> None:
        times.append(now() - begun.pop())

    return note
