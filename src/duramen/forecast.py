"""What a run will touch, need and take, before it starts; nothing is read but headers.

Counts of removed weights are exact. Memory and time are predictions, and are called so: time is the arithmetic of the walk,
the solves and the evaluation, divided by the matrix speed of this machine as measured now.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

from duramen.evaluate.evaluate import Settings as EvaluateSettings
from duramen.export.step import ENGINES
from duramen.export.step import Settings as ExportSettings
from duramen.families.model import BlockModel
from duramen.families.select import filter_layers
from duramen.grids import parse_format
from duramen.prune.model import PruneSettings
from duramen.prune.pattern import Scope, parse_pattern
from duramen.quantize import qat, rotate, smooth
from duramen.quantize.allocation import bits_of
from duramen.quantize.model import TYPES, QuantizeSettings, formats_of
from duramen.recipe import Recipe, Step
from duramen.recover import refit, rora
from duramen.registry import Settings
from duramen.search import evolution, masks, subnet
from duramen.shrink import cut, depth
from duramen.shrink.model import ShrinkSettings, predicted
from duramen.shrink.surgery import REMOTE, Surgery, left
from duramen.tokens import reduction

EFFICIENCY = 0.6
"""Share of the speed of a large matrix product that whole runs reached on the machines we measured."""
BASE_MEMORY = 700 * 2**20
"""Bytes of the interpreter with its libraries."""


def forecast(model: BlockModel, recipe: Recipe, steps: list[Step], *, gigaflops: float) -> dict[str, Any]:
    """Predicts a run; steps behind a cut are foretold for what it leaves.

    Args:
        model: The model, opened from its folder.
        recipe: What will run.
        steps: Its steps, resolved.
        gigaflops: Speed of a float32 matrix product on this machine.

    Raises:
        Problem: If a filter matches nothing, or a step cannot be carried out on the shapes that it will meet.
    """
    shapes = _shapes(model)
    tokens = recipe.calibration.sequences * recipe.calibration.length
    width = model.sizes(0).width if model.family.groups else max(shape[1] for shape in shapes.values())
    macs = {"before": sum(map(prod, shapes.values())) + _head(model)}
    opens, entries, edited = ORDINARY, [], False
    for step in steps:
        entry: dict[str, Any]
        if not type(step.settings).__module__.startswith("duramen."):
            entry = {"flops": 0.0, "memory_bytes": BASE_MEMORY, "note": "a method of another package, which is not foretold"}
        elif isinstance(step.settings, EvaluateSettings):
            entry = {"flops": _evaluation_flops(step.settings, model, shapes, 2 if edited else 1), "memory_bytes": 0}
        elif isinstance(step.settings, ExportSettings):
            entry = _exported(model, shapes, step.settings)
        elif isinstance(step.settings, PruneSettings):
            names = filter_layers(model.layer_names(), step.settings.only, step.settings.skip)
            flops = _walk_flops(model, shapes, names, tokens) + sum(_solve_flops(step.settings, shapes[name]) for name in names)
            memory = _memory(model, shapes, step.settings, tokens, width)
            entry = {"flops": flops, "memory_bytes": memory} | _coverage(model, shapes, names, step.settings)
        elif isinstance(step.settings, QuantizeSettings):
            entry = _rounded(model, shapes, step.settings, tokens, width)
        elif isinstance(step.settings, rotate.Settings):
            entry = {
                "flops": 4.0 * sum(map(prod, shapes.values())) * width,
                "memory_bytes": BASE_MEMORY + 24 * _outside(model) + 8 * _largest_block(model, shapes),
            }
            entry["note"] = "weights change, the model does not; a tied head gets weights of its own"
        elif isinstance(step.settings, smooth.Settings):
            flops = 4.0 * tokens * sum(map(prod, shapes.values()))
            entry = {"flops": flops, "memory_bytes": BASE_MEMORY + 8 * _outside(model) + 8 * _largest_block(model, shapes)}
            entry["note"] = "weights change, the model does not"
        elif isinstance(step.settings, refit.Settings):
            entry = _refitted(model, shapes, step.settings, tokens, width)
        elif isinstance(step.settings, rora.Settings | qat.Settings):
            entry = _trained(model, shapes, step.settings, recipe.calibration.length, tokens)
        elif isinstance(step.settings, reduction.Settings):
            entry = _shortened(model, shapes, step.settings, recipe.calibration.length)
            opens = READS_SHORTER
        else:
            surgery = _surgery(model, step.settings)
            entry = _shrunk(model, shapes, step, surgery, tokens, width)
            macs["after"], opens = surgery.summary["macs_per_token"]["after"], entry.pop("opens_in")
            model = left(surgery)
            shapes = _shapes(model)
        edited = edited or not isinstance(step.settings, EvaluateSettings | ExportSettings)
        entries.append(
            {"id": step.id, "method": step.method, "seconds": entry.pop("flops") / gigaflops / 1e9 / EFFICIENCY, **entry}
        )
    return {
        "steps": entries,
        "seconds": sum(entry["seconds"] for entry in entries),
        "memory_bytes": max(entry["memory_bytes"] for entry in entries),
        "calibration_tokens": tokens,
        "macs_per_token": {"after": macs["before"]} | macs,
        "loads_in": opens,
    }


READS_SHORTER = "duramen.load, which shortens prompts; plain transformers opens the dense model"
ORDINARY = "transformers, vLLM and every tool that opens the source folder; the result is an ordinary dense checkpoint"


def _surgery(model: BlockModel, settings: Settings) -> Surgery:
    """What a step that changes shapes comes to."""
    if isinstance(settings, ShrinkSettings):
        return predicted(model, settings)
    if isinstance(settings, depth.Settings):
        return depth.predicted(model, settings)
    if isinstance(settings, evolution.Settings):
        return evolution.predicted(model, settings)
    if isinstance(settings, masks.Settings):
        return masks.predicted(model, settings)
    if isinstance(settings, subnet.Settings):
        return Surgery(model, subnet.chosen_point(model, settings)[0])
    assert isinstance(settings, cut.Settings)
    return Surgery(model, cut.fitting(model, settings))


def _shrunk(
    model: BlockModel, shapes: dict[str, tuple[int, int]], step: Step, surgery: Surgery, tokens: int, width: int
) -> dict[str, Any]:
    """A step that cuts units: widths of ``local``, gradients, repair of the projections that read units."""
    settings, summary = step.settings, surgery.summary
    readers = list(dict.fromkeys(units.reader for here in surgery.units for units in here))
    seen = getattr(settings, "gradient_sequences", 0) * getattr(settings, "gradient_length", 0)
    passes = 2 if getattr(settings, "alpha", 0) else 1
    solves = sum(4 * shapes[name][1] ** 3 + 2 * shapes[name][0] * shapes[name][1] ** 2 for name in readers)
    flops = (
        8.0 * seen * summary["macs_per_token"]["before"]
        + passes * _walk_flops(model, shapes, readers or list(shapes), tokens)
        + solves
    )
    block, outside = _largest_block(model, shapes), _outside(model)
    widest = max((shapes[name][1] for name in readers), default=0)
    kept = 4 * seen * width * (len(model.blocks) + 1)
    memory = BASE_MEMORY + 4 * outside + 12 * block + 8 * tokens * width * passes + min(kept, 2 * 2**30) + 48 * widest**2
    scored = getattr(settings, "allocation", "local") != "local"
    if isinstance(settings, evolution.Settings | masks.Settings):
        scored = True
        flops += 2.0 * settings.candidate_tokens(tokens, len(readers)) * summary["macs_per_token"]["before"]
    before, after = summary["parameters"]["before"], summary["parameters"]["after"]
    note = f"{after:,} parameters instead of {before:,} ({after / before - 1:+.1%})"
    return {
        "flops": flops, "memory_bytes": memory, "parameters": summary["parameters"],
        "opens_in": REMOTE if scored and not getattr(settings, "homogenise", False) else summary["opens_in"],
        "units": [
            {"kind": kind, "units": found["units"], "stay": found["kept"][0], "parameters": next(u.parameters for u in surgery.units[0] if u.kind == kind)}
            for kind, found in summary["kinds"].items()
        ],
        "note": f"{note}; widths will follow the scores, block by block" if scored else note,
    }  # fmt: skip


def _rounded(
    model: BlockModel, shapes: dict[str, tuple[int, int]], settings: QuantizeSettings, tokens: int, width: int
) -> dict[str, Any]:
    """Rounding: a walk, and where weights go to a grid a sweep, and the rounds that refine it."""
    names, wanted = filter_layers(model.layer_names(), settings.only, settings.skip), parse_format(settings.format)
    formats_of(model, names, wanted)
    memory, grid = _memory(model, shapes, settings, tokens, width), wanted.weights
    kept = [f"{wanted.inputs.bits} bits of inputs"] if wanted.inputs else []
    kept += [f"{wanted.cache.bits} bits of keys and values"] if wanted.cache else []
    if grid is None:
        return {"flops": _walk_flops(model, shapes, [], tokens), "memory_bytes": memory, "note": ", ".join(kept)}
    bits: float = sum(bits_of(grid, *shapes[name], TYPES[settings.step_type]) for name in names)
    weights = sum(prod(shapes[name]) for name in names)
    walks = 1 + (settings.mean_bits is not None)
    flops = walks * _walk_flops(model, shapes, names, tokens) + sum(_solve_flops(settings, shapes[name]) for name in names)
    bits = bits if settings.mean_bits is None else settings.mean_bits * weights
    note = f"{bits / weights:.2f} bits per weight in {len(names)} layers, {bits / 8 / 2**20:,.0f} MiB; stored as ordinary tensors too"
    return {"flops": flops, "memory_bytes": memory, "note": "; ".join([note, *kept])}


def _refitted(
    model: BlockModel, shapes: dict[str, tuple[int, int]], settings: refit.Settings, tokens: int, width: int
) -> dict[str, Any]:
    """A refit: both models run, three sums for every stage, and a solve for every layer and damping."""
    names = filter_layers(model.layer_names(), settings.only, settings.skip)
    tries = len(settings.damping_grid) if settings.damping == "held-out" else 1
    solves = sum(
        (tries + 1) * 4 * inputs**3 + 40 * min(outputs, 128) * tries * inputs**2 + 60 * outputs * inputs**2
        for outputs, inputs in (shapes[name] for name in names)
    )
    flops = 3 * _walk_flops(model, shapes, names, tokens) + solves
    widest = max(shapes[name][1] for name in names)
    memory = BASE_MEMORY + 8 * _outside(model) + 16 * _largest_block(model, shapes) + 8 * tokens * width + 130 * widest**2
    return {
        "flops": flops,
        "memory_bytes": memory,
        "note": f"{len(names)} layers, of which those are refitted that lost something",
    }


def _trained(
    model: BlockModel, shapes: dict[str, tuple[int, int]], settings: rora.Settings | qat.Settings, length: int, tokens: int
) -> dict[str, Any]:
    """Training: three times a forward pass for every token, one more by the teacher, and a walk that writes what was learned."""
    names = filter_layers(model.layer_names(), settings.only, settings.skip)
    everything = sum(map(prod, shapes.values())) + _head(model)
    distils = settings.objective != "ce"
    looked = (settings.steps // settings.every + 1) * settings.held_out * tokens
    seen = settings.steps * settings.batch * length
    flops = 2.0 * everything * (seen * (4 if distils else 3) + looked * (2 if distils else 1))
    if isinstance(settings, qat.Settings):
        if settings.format:
            formats_of(model, names, parse_format(settings.format))
        trained = sum(prod(shapes[name]) for name in names)
        note = f"{trained:,} weights in {len(names)} layers and their steps, learning rate {settings.learning_rate:.2g}"
    else:
        for name in names:
            rora.check_rank(name, shapes[name], settings.rank)
        trained = sum(settings.rank * sum(shapes[name]) for name in names)
        note = f"{trained:,} parameters in {len(names)} layers, γ {settings.gamma:.3g}, learning rate {settings.rate:.2g}"
    logits = 12 * settings.at_once * length * model.config.vocab_size
    activations = 12 * settings.at_once * length * sum(inputs for _, inputs in shapes.values())
    whole = 4 * (sum(map(prod, shapes.values())) + _outside(model)) * (2 if distils else 1)
    memory = BASE_MEMORY + whole + 16 * trained + logits + activations
    return {"flops": flops + _walk_flops(model, shapes, names, tokens), "memory_bytes": memory, "note": note}


def _exported(model: BlockModel, shapes: dict[str, tuple[int, int]], settings: ExportSettings) -> dict[str, Any]:
    """A copy of the weights, and twenty prompts of some ten tokens that transformers continues by 32."""
    everything = sum(map(prod, shapes.values())) + _head(model)
    return {
        "flops": 2.0 * everything * 20 * 60,
        "memory_bytes": BASE_MEMORY + 8 * everything,
        "note": f"for {ENGINES[settings.form]}",
    }


def _shortened(
    model: BlockModel, shapes: dict[str, tuple[int, int]], settings: reduction.Settings, length: int
) -> dict[str, Any]:
    """Forward passes of what is tried, up to six times; a sample; and one check."""
    everything = sum(map(prod, shapes.values())) + _head(model)
    candidates = next(iter(reduction.candidates(model, settings)[1]))
    seen = (6 if settings.choose else 1) * settings.sequences * length
    note = f"tokens leave after layers {', '.join(map(str, candidates.sites))}, where {candidates.keep[0]:.1%} stay"
    memory = (
        BASE_MEMORY
        + 4 * _outside(model)
        + 8 * _largest_block(model, shapes)
        + 8 * settings.sequences * length * model.config.hidden_size
    )
    return {"flops": 2.0 * everything * seen, "memory_bytes": memory, "note": f"{note} (predicted; other layers may be chosen)"}


def _shapes(model: BlockModel) -> dict[str, tuple[int, int]]:
    """[O, I] of every layer."""
    return {name: model.shape(name) for name in model.layer_names()}


def _coverage(
    model: BlockModel, shapes: dict[str, tuple[int, int]], names: list[str], settings: PruneSettings
) -> dict[str, Any]:
    roles: dict[str, dict[str, Any]] = {}
    scope: Scope = getattr(settings, "scope", "layer")
    for name in names:
        role, block = model.layer_names()[name]
        target = settings.at(block, len(model.blocks))
        pattern = parse_pattern(target["sparsity"], target["pattern"])  # type: ignore[arg-type]
        entry = roles.setdefault(role, {"role": role, "shape": list(shapes[name]), "layers": 0, "parameters": 0, "removed": 0})
        entry["layers"] += 1
        entry["parameters"] += prod(shapes[name])
        entry["removed"] += pattern.total(*shapes[name], scope=scope)
    return {"roles": list(roles.values()), "skipped": [name for name in shapes if name not in set(names)]}


def _head(model: BlockModel) -> int:
    head = model.network.get_output_embeddings()  # type: ignore[operator]
    return 0 if head is None else int(head.weight.numel())


def _walk_flops(model: BlockModel, shapes: dict[str, tuple[int, int]], names: list[str], tokens: int) -> float:
    """Every stage runs the block up to itself and adds a Gram; then the block runs once more. Settled parts are counted too."""
    flops = 0.0
    for index in range(len(model.blocks)):
        before = 0
        for stage in model.stages(index):
            layers = [f"{model.family.blocks}.{index}.{item.path}" for item in stage]
            if set(layers) & set(names):
                flops += 2 * tokens * (before + shapes[layers[0]][1] ** 2)
            before += sum(prod(shapes[name]) for name in layers)
        flops += 2 * tokens * before
    return flops


def _solve_flops(settings: PruneSettings | QuantizeSettings, shape: tuple[int, int]) -> float:
    outputs, inputs = shape
    products = settings.products
    tries = len(settings.damping_grid) if getattr(settings, "damping", None) == "held-out" else 0
    return 2 * (outputs * products + min(outputs, 128) * tries * 16) * inputs**2 + (1 + tries) * 4 * inputs**3 * (products > 0)


def _evaluation_flops(
    settings: EvaluateSettings, model: BlockModel, shapes: dict[str, tuple[int, int]], subjects: int
) -> float:
    """Windows and task documents (about 150 tokens each with their choices)."""
    parameters = sum(map(prod, shapes.values())) + _head(model)
    tokens = len(settings.text) * (settings.windows or 150) * settings.length + len(settings.tasks) * settings.documents * 150
    return 2.0 * parameters * tokens * subjects


def _memory(
    model: BlockModel,
    shapes: dict[str, tuple[int, int]],
    settings: PruneSettings | QuantizeSettings,
    tokens: int,
    width: int,
) -> int:
    """Outside tensors, one block twice (stored and running), one boundary, the widest layer's Grams and its solve."""
    block, outside = _largest_block(model, shapes), _outside(model)
    grams = 1 + (getattr(settings, "damping", None) == "held-out") + 2 * (settings.alpha > 0)
    solve = max(8 * inputs**2 * (grams + 4) + 4 * 8 * outputs * inputs for outputs, inputs in shapes.values())
    boundary = 4 * tokens * width * (1 + (settings.alpha > 0))
    return BASE_MEMORY + 4 * outside + 2 * 4 * block + 2 * boundary + solve


def _largest_block(model: BlockModel, shapes: dict[str, tuple[int, int]]) -> int:
    """Weights of the block that has most."""
    sizes: Counter[int] = Counter()
    for name, (_, block) in model.layer_names().items():
        sizes[block] += prod(shapes[name])
    return max(sizes.values())


def _outside(model: BlockModel) -> int:
    """Parameters outside the blocks."""
    named = model.network.named_parameters()
    return sum(parameter.numel() for name, parameter in named if not name.startswith(model.family.blocks))
