"""Sub-network search: the widths, KV groups and parts of every block that keep most of the model under a budget, without training.

"Search for Efficient Large Language Models" (Shen et al., arXiv 2409.17372) evolves masks, rejects what is outside the budget, and
re-fits the winner. Here a candidate is a level of a nested order for every kind of units in every block, with weights that are
optimal at each level (``levels``), so that mutations are switches between neighbouring levels that keep the budget, as in EvoPress
(arXiv 2410.14649); the start is the optimum of what the modules lose alone; fitness is the KL from the dense model on sequences that the
levels were not fitted to; and the winner is reformed exactly on what its own blocks before really put out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from duramen.calibrate import ranks
from duramen.calibrate.walker import SCRATCH, Memo, Records, Walk
from duramen.families import OWN
from duramen.families.model import BlockModel, Model
from duramen.families.select import filter_layers
from duramen.problem import Exit, Problem
from duramen.registry import method
from duramen.search.constraints import BudgetSettings, Limit, costs_of, expected_share, limits, repair, split
from duramen.search.database import Database, Genome, Module, build, describe, grid_of, plan_of, restore
from duramen.search.fitness import divergences, draw_rows, teach
from duramen.search.latency import prefills
from duramen.search.mutate import switch_levels
from duramen.search.nested import NESTED, write_nested
from duramen.search.subnet import FORMAT, SEARCH
from duramen.search.surrogate import Table, probed_levels, single_module_table, solve, thought
from duramen.search.team import Make, Team, team_of
from duramen.shrink.groups import find_units
from duramen.shrink.model import carry_out
from duramen.shrink.plan import Plan, digest
from duramen.shrink.surgery import Surgery
from duramen.train.objective import Lesson

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the first resource, at which the front has a point."""
FAILURES = 3
"""Candidates of one generation whose outputs are not finite before the search stops."""


class Settings(BudgetSettings):
    """Settings of the search."""

    families: Annotated[tuple[Literal["ffn_channel", "kv_group"], ...], Field(min_length=1)] = ("ffn_channel", "kv_group")
    """What may be cut."""
    off: bool = True
    """Whether the attention or the MLP of a block may leave altogether; the attention of the first block stays."""
    runtime: Literal["transformers", "vllm", "llama.cpp"] = "transformers"
    """Who is to open the result; the others hold fewer shapes, and the search keeps to them."""
    only: tuple[str, ...] = ()
    """Projections that read the units that may go, by role (`down`), block range (`blocks:4-27`) or glob; empty means all."""
    skip: tuple[str, ...] = ()
    """Projections whose units stay, in the same words."""
    levels: Annotated[int, Field(ge=2)] = 16
    """About so many widths for every FFN."""
    round_to: Annotated[int, Field(ge=1)] = 64
    """FFN widths are multiples of it."""
    start: Literal["best", "knapsack", "uniform"] = "best"
    """Where evolution begins: at the best sum of what modules lose alone, at the same share everywhere, or at the better of the two."""
    generations: Annotated[int, Field(ge=0)] = 20
    """How many, at most."""
    patience: Annotated[int, Field(ge=1)] = 8
    """Generations without a better candidate after which the search ends."""
    offspring: Annotated[int, Field(ge=1)] = 8
    """Candidates of a generation; twice as many are drawn, and the sum of what modules lose alone chooses."""
    stages: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], ...] = ((1024, 2),)
    """(tokens, survivors): how a generation is narrowed down before the last candidates meet their parent on all search tokens."""
    nested: bool = False
    """Whether to write `nested.safetensors` as well: one file from which every point of the front opens without another repair."""
    top_k: Annotated[int, Field(ge=1)] = 512
    """Likeliest tokens of the dense model that count one by one; all others count together."""

    def candidate_tokens(self, tokens: int, modules: int) -> float:
        """At most so many tokens run through candidates, of so many calibration tokens; half of every single-module trial is shared."""
        pool, left = self.search_share * tokens, self.offspring
        generation = 0.0
        for count, survivors in self.stages:
            generation, left = generation + left * min(count, pool), min(left, survivors)
        probe = min(self.stages[0][0], pool) if self.stages else pool
        return self.generations * (generation + left * pool) + 1.5 * modules * probe + 8 * pool


@dataclass
class Search:
    """All that a search works with.

    Attributes:
        database: Levels of all modules.
        bounds: What candidates may cost.
        pool: Token ids on which candidates are compared, [N, T].
        settings: The method's settings.
        team: Workers that measure, if there are any.
    """

    database: Database
    bounds: Sequence[Limit]
    pool: Tensor
    settings: Settings
    team: Team | None = None

    @cached_property
    def lessons(self) -> list[Lesson]:
        """What the dense model says of the pool."""
        return teach(self.database.model, self.pool, self.settings.top_k)

    def measure(self, genomes: Sequence[Genome], chosen: Sequence[int] | None = None) -> list[float]:
        """KL of candidates from the dense model on some sequences of the pool, or on all of them."""
        rows = list(range(len(self.pool))) if chosen is None else list(chosen)
        if self.team is not None:
            return self.team.measure(genomes, rows)
        return divergences(self.database, genomes, self.pool[rows], [self.lessons[row] for row in rows])

    def children(self, parent: Genome, table: Table, generator: torch.Generator) -> list[Genome]:
        """Mutants of a parent inside all limits, the half that is thought best."""
        drawn: dict[Genome, None] = {}
        for _ in range(20 * self.settings.offspring):
            child = switch_levels(parent, self.database.modules, generator)
            child = repair(child, self.bounds, table, self.database.modules)
            if child != parent:
                drawn[child] = None
            if len(drawn) == 2 * self.settings.offspring:
                break
        return sorted(drawn, key=lambda genome: (thought(table, genome), genome))[: self.settings.offspring]

    def front(self, table: Table, winner: Genome, loss: float) -> list[dict[str, Any]]:
        """What other budgets of the first resource would cost: the best sum of what modules lose alone at each, and the winner.

        Returns:
            ``share`` of the dense model's, ``levels`` and ``kl``, from the smallest to the largest.
        """
        bound = self.bounds[0]
        least = bound.rest + sum(map(min, bound.table))
        shares = [share for share in SHARES if least <= share * bound.whole]
        tighter = [[dataclasses.replace(bound, most=share * bound.whole)] for share in shares]
        genomes = [
            repair(solve(table, bounds), bounds, table, self.database.modules) for bounds in tighter
        ]  # the solver has a tolerance
        points = dict(zip(genomes, self.measure(genomes), strict=True)) | {winner: loss}
        return sorted(
            ({"share": bound.cost(genome) / bound.whole, "levels": list(genome), "kl": kl} for genome, kl in points.items()),
            key=lambda point: (point["share"], point["kl"]),
        )

    def generation(self, number: int, parent: Genome, loss: float, table: Table) -> dict[str, Any]:
        """One generation: mutants, narrowed down, against their parent.

        Returns:
            ``parent`` and ``kl`` of the next one; ``tried``: (stage, candidate, KL) of all; ``tokens`` run.
        """
        generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + number)
        left, tried, tokens = self.children(parent, table, generator), [], 0
        stages = [(draw_rows(self.pool, count, generator), survivors) for count, survivors in self.settings.stages]
        for stage, (rows, survivors) in enumerate([*stages, (list(range(len(self.pool))), 1)]):
            if not left:
                break
            found = self.measure(left, rows)
            tokens += len(left) * len(rows) * self.pool.shape[1]
            tried += [[stage, list(genome), kl if math.isfinite(kl) else None] for genome, kl in zip(left, found, strict=True)]
            _check(found, f"generation {number}", FAILURES - 1)
            ranked = sorted((kl, genome) for genome, kl in zip(left, found, strict=True) if math.isfinite(kl))
            left = [genome for _, genome in ranked[:survivors]]
            best = ranked[0][0] if ranked else math.inf
        better = bool(left) and best < loss
        return {"parent": list(left[0] if better else parent), "kl": best if better else loss, "tried": tried, "tokens": tokens}


def _check(found: Sequence[float], where: str, allowed: int = 0) -> None:
    """Stops where the outputs of more candidates than that are not finite."""
    failed = sum(not math.isfinite(kl) for kl in found)
    if failed > allowed:
        raise Problem(
            f"{failed} candidates of {where} have outputs that are not finite.",
            why="the model overflows in this type when parts of it are cut.",
            fix="`dtype: float32`; finished generations are kept.",
            code=Exit.CHECK_FAILED,
        )


def evolve(search: Search, table: Table, starts: dict[str, Genome], memo: Memo) -> dict[str, Any]:
    """Runs generations until they are over or no longer better, each from the best so far.

    Returns:
        ``starts``: KL of every start; ``generations``; ``winner`` and its ``kl``; ``tokens``: candidate tokens run by all generations.
    """
    first = memo("starts", lambda: search.measure(list(starts.values())))
    _check(first, "the starts")
    found = dict(zip(starts, first, strict=True))
    chosen = min(found, key=lambda name: found[name]) if search.settings.start == "best" else search.settings.start
    parent, loss = starts[chosen], found[chosen]
    generations: list[dict[str, Any]] = []
    idle = 0
    for number in range(search.settings.generations):
        step = memo(f"generation-{number:04d}", partial(search.generation, number, parent, loss, table))
        generations.append(step)
        idle = 0 if step["kl"] < loss else idle + 1
        parent, loss = tuple(step["parent"]), step["kl"]
        if idle == search.settings.patience:
            break
    return {
        "starts": {name: {"levels": list(genome), "kl": found[name]} for name, genome in starts.items()}, "start": chosen,
        "generations": generations, "winner": list(parent), "kl": loss, "tokens": sum(step["tokens"] for step in generations),
    }  # fmt: skip


NARROWED = {
    "transformers": "",
    "vllm": "for vLLM an attention keeps all its heads or leaves, since its class for blocks of several shapes has one number of query heads (expected, not run here)",
    "llama.cpp": "for llama.cpp every level can be written (`duramen export gguf`); an MLP that leaves stands as 32 channels of zeros",
}
"""What a runtime does to the space of candidates."""


def chosen_modules(model: BlockModel, settings: Settings) -> list[Module]:
    """What may be cut, and how many units each level keeps, in running order; the units are not ordered yet.

    Raises:
        Problem: On filters that match nothing, or a family that the runtime has no place for.
    """
    base = str(model.config.model_type).removeprefix(OWN)
    if settings.runtime != "transformers" and base not in ("llama", "mistral"):
        raise Problem(
            f"{settings.runtime} cannot open blocks of several shapes of a model of type {base}.",
            why="its class for such models has the arithmetic of Llama.",
            fix="`runtime: transformers`, or `fusion` with `allocation: local`, which gives one shape to all blocks.",
            code=Exit.INCOMPATIBLE,
        )
    units = {each.reader: each for each in find_units(model, settings.families)}
    roles = {name: role for name, role in model.layer_names().items() if name in units}
    kept = set(filter_layers(roles, settings.only, settings.skip))
    found = []
    for name in roles:
        each = units[name]
        off = settings.off and not (each.kind == "kv_group" and each.block == 0)
        grid = grid_of(each, levels=settings.levels, round_to=settings.round_to, off=off)
        if settings.runtime == "vllm" and each.kind == "kv_group":
            grid = tuple(kept for kept in grid if kept in (0, each.count))
        if name in kept and len(grid) > 1:
            found.append(Module(each, grid))
    return found


def uniform(modules: Sequence[Module], bounds: Sequence[Limit], table: Sequence[Sequence[float]]) -> Genome:
    """The same share everywhere, inside the limits."""
    share = expected_share(bounds)
    return repair(tuple(module.nearest(share) for module in modules), bounds, table, modules)


def predicted(model: BlockModel, settings: Settings) -> Surgery:
    """The same share everywhere inside the limits, as if all units were alike."""
    modules = [
        dataclasses.replace(module, order=tuple(range(module.units.count))) for module in chosen_modules(model, settings)
    ]
    bounds = limits(model, modules, settings.target, bits=settings.bits)
    losses = [[1 - kept / module.units.count for kept in module.grid] for module in modules]
    plan = plan_of(model, modules, uniform(modules, bounds, losses), {})
    return Surgery(model, plan)


@method("search", title="Sub-network search", paper="arXiv 2409.17372", kind="search", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Searches, cuts what the winner leaves out, and repairs the rest; see ``duramen.shrink.model.carry_out``.

    Raises:
        Problem: On limits out of reach, filters that match nothing, families without a table, values that are not finite.
    """
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    blocks = BlockModel.of(model)
    if walk.folder is not None:
        return _apply(blocks, tokens, chosen, walk, walk.folder)
    if chosen.nested:
        raise Problem(
            "There is no folder for a nested checkpoint.",
            why="the model is only in memory.",
            fix="`duramen run`, or `nested: false`.",
        )
    with TemporaryDirectory(dir=walk.scratch, prefix=SCRATCH) as place:
        return _apply(blocks, tokens, chosen, walk, Path(place))


def _apply(model: BlockModel, tokens: Tensor, settings: Settings, walk: Walk, folder: Path) -> Records:
    modules = chosen_modules(model, settings)
    bounds = limits(model, modules, settings.target, bits=settings.bits, memo=walk.memo)
    fitted, pool = split(tokens, settings.search_share)
    database = build(model, modules, expected_share(bounds), fitted, settings, walk, folder)
    search = Search(database, bounds, pool, settings)

    def make() -> Make:
        return partial(_same_search, describe(database.modules), database.folder, pool, settings, search.lessons)

    with team_of(model, make, walk) as search.team:
        table, starts, before = prepare(search, walk.memo)
        found = evolve(search, table, starts, walk.memo)
        found["tokens"] += before
        winner: Genome = tuple(found["winner"])
        front = walk.memo("front", lambda: search.front(table, winner, found["kl"]))
    costs = costs_of(bounds, winner)
    modules = database.modules
    report = {
        "format": FORMAT,
        "base": digest(model),
        "costs": costs,
        "modules": [item | {"alone": alone} for item, alone in zip(describe(modules), table, strict=True)],
        "front": front,
    } | found
    lineage = [found["starts"][found["start"]]["kl"], *(step["kl"] for step in found["generations"])]
    made_by = {
        "method": "search", "settings": settings.model_dump(mode="json"), "costs": costs, "kl": found["kl"],
        "starts": {name: start["kl"] for name, start in found["starts"].items()}, "lineage": lineage, "tokens": found["tokens"],
        "front": [{key: point[key] for key in ("share", "kl")} for point in front], "narrowed": NARROWED[settings.runtime],
    }  # fmt: skip
    plan = plan_of(model, modules, winner, made_by)
    if "latency" in settings.target:
        prefill = walk.memo("prefill", lambda: ranks.led(lambda: _prefills(model, plan)))
        plan = dataclasses.replace(plan, made_by=made_by | {"prefill": prefill})
    walk.files[SEARCH] = json.dumps(report)
    if settings.nested:
        walk.files[NESTED] = folder / NESTED
        if ranks.leads():
            write_nested(folder / NESTED, search.database, report)
        ranks.wait()
    return carry_out(plan, model, tokens, settings, walk, [module.units for module in modules])


def _prefills(model: BlockModel, plan: Plan) -> dict[str, float]:
    """Milliseconds of a prefill by the dense model and by what a plan leaves of it, as measured now."""
    return prefills({"dense": Surgery(model, Plan(plan.base, plan.blocks)), "winner": Surgery(model, plan)})


def _same_search(
    described: list[dict[str, Any]], folder: Path, pool: Tensor, settings: Settings, lessons: list[Lesson], model: BlockModel
) -> Search:
    """The search as a worker has it, which knows no limits."""
    search = Search(Database(model, restore(model, described), folder), [], pool, settings)
    search.lessons = lessons
    return search


def prepare(search: Search, memo: Memo) -> tuple[Table, dict[str, Genome], int]:
    """What comes before evolution once there are levels: what modules lose alone, the starts, and the tokens that both run."""
    chosen, modules = search.settings, search.database.modules
    tokens = chosen.stages[0][0] if chosen.stages else search.pool.numel()
    rows = draw_rows(search.pool, tokens, torch.Generator().manual_seed(chosen.seed))
    found = memo("alone", lambda: single_module_table(search.database, lambda genomes: search.measure(genomes, rows)))
    table = tuple(map(tuple, found))
    starts = {
        "uniform": uniform(modules, search.bounds, table),
        "knapsack": repair(solve(table, search.bounds), search.bounds, table, modules),
    }
    trials = sum(len(probed_levels(module)) for module in modules)
    return table, starts, trials * len(rows) * search.pool.shape[1] + len(starts) * search.pool.numel()
