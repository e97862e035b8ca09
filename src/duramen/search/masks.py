"""Sub-network search as published: an evolution of masks, repaired where what is printed cannot work.

"Search for Efficient Large Language Models" (Shen et al., arXiv 2409.17372), Section 3. A candidate says which units of every block
stay; nothing is re-fitted until the search is over. Importance initialises the masks; children change how many blocks and units stay,
and which, or mix two parents; the best by perplexity live on. Repaired: masks mutate by the law that Algorithm 1 is after (``mutate``), candidates
are brought inside the budget instead of rejected, any blocks may leave instead of the last ones, and parents are measured again on
the tokens that their children see. Dimensions inside heads stay, as in the published example: no stock attention could serve them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families.model import BlockModel, Layer, Model, OpenBlock
from duramen.problem import Exit, Problem
from duramen.prune.factor import factorise
from duramen.registry import method
from duramen.search.constraints import BudgetSettings, Limit, costs_of, expected_share, limits, split
from duramen.search.database import Module
from duramen.search.fitness import divergences, draw_rows, losses, teach
from duramen.search.mutate import mutate_mask
from duramen.search.team import Team, team_of
from duramen.shrink.allocate import Scores
from duramen.shrink.groups import Units, find_units
from duramen.shrink.model import carry_out
from duramen.shrink.plan import Plan, digest
from duramen.shrink.surgery import Surgery, silenced, zeroed
from duramen.train.objective import Lesson

Masks = tuple[tuple[int, ...], ...]
"""A candidate: for every module the units that stay, sorted; none of a block's where it left."""
KINDS = ("kv_group", "ffn_channel")
STEP = 0.05
"""Share of the FFN channels by which widths differ."""
CLOSE = 0.005
"""A candidate is filled up until it is this near to its limit."""
FIRST = {"blocks": 0.0, "widths": 0.3, "masks": 0.6}
"""Chances of the initial candidates, and of the fresh ones later: that another number of blocks stays; for every module, that another number of units does, and that other ones do."""
LATER = {"blocks": 0.1, "widths": 0.1, "masks": 0.3}
"""Chances of mutants."""


class Settings(BudgetSettings):
    """Settings of the search for masks."""

    families: Annotated[tuple[Literal["ffn_channel", "kv_group"], ...], Field(min_length=1)] = ("ffn_channel",)
    """Units that are masked; whole blocks may leave as well."""
    epochs: Annotated[int, Field(ge=1)] = 50
    """How often parents have children."""
    population: Annotated[int, Field(ge=2)] = 100
    """Candidates of an epoch."""
    mutants: Annotated[int, Field(ge=0)] = 50
    """How many of them are mutants of one parent; what neither mutants nor crossovers make up is made afresh."""
    crossovers: Annotated[int, Field(ge=0)] = 30
    """How many mix two parents."""
    parents: Annotated[int, Field(ge=1)] = 10
    """The best that live on."""
    similarity: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of the units that a mutated mask has in common with its parent, at least."""
    fitness: Literal["perplexity", "kl"] = "perplexity"
    """What is compared: the candidate's own loss, or its divergence from the dense model."""
    fitness_tokens: Annotated[int, Field(ge=1)] = 10240
    """On so many tokens, drawn anew for every epoch."""
    top_k: Annotated[int, Field(ge=1)] = 512
    """With `fitness: kl`, likeliest tokens of the dense model that count one by one."""

    @model_validator(mode="after")
    def _no_more_than_a_population(self) -> Settings:
        if self.mutants + self.crossovers > self.population:
            raise Problem(
                f"{self.mutants} mutants and {self.crossovers} crossovers are more than a population of {self.population}.",
                why="they are part of it; the rest is made afresh.",
                fix="fewer of them, or a larger `population`.",
            )
        return self

    @model_validator(mode="after")
    def _counted_not_timed(self) -> Settings:
        if "latency" in self.target:
            raise Problem(
                "`search_masks` has no limit for `latency`.",
                why="every number of units would have to be timed.",
                fix="a target for `macs`, or the method `search`.",
            )
        return self

    def candidate_tokens(self, tokens: int, modules: int) -> float:
        """At most so many tokens run through candidates, of so many calibration tokens."""
        return (self.population + (self.epochs - 1) * (self.parents + self.population)) * min(
            self.fitness_tokens, self.search_share * tokens
        )


def importance(model: BlockModel, units: Sequence[Units], tokens: Tensor, walk: Walk) -> Scores:
    """Equation 1 over every row that writes a unit and every column that reads it: Σ w² / [(2XXᵀ)⁻¹]ⱼⱼ, X the input of its own layer.

    Args:
        model: The model; it stays as it is.
        units: What to score.
        tokens: Calibration token ids, [S, T].
        walk: How to walk.
    """

    def look(layers: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        factor = factorise(statistics.total.second)
        doubled = (2 / factor.inverse.diagonal()).masked_fill(factor.dead, 0)

        def score(layer: Layer) -> dict[str, Any]:
            found = layer.read().to(doubled).square() * doubled
            return {"rows": found.sum(1).tolist(), "columns": found.sum(0).tolist()}

        return score

    root = f"{model.family.blocks}."
    names = set(model.layer_names())
    layers = {
        name: None
        for each in units
        for m in each.members
        if (name := f"{root}{each.block}.{m.path.rpartition('.')[0]}") in names
    }
    looking = replace(walk, store=None, progress=lambda record: None)
    seen = {record["layer"]: record for record in walk_blocks(model, tokens, look, list(layers), walk=looking)}
    scores = {}
    for each in units:
        total = torch.zeros(each.count)
        for member in each.members:
            layer, _, kind = member.path.rpartition(".")
            if kind == "weight" and f"{root}{each.block}.{layer}" in seen:
                part = torch.tensor(seen[f"{root}{each.block}.{layer}"]["columns" if member.reads else "rows"])
                total += part[member.indices(each.sizes, range(each.count))].reshape(each.count, -1).sum(1)
        scores[each.block, each.kind] = total
    return scores


@dataclass
class Space:
    """All candidates, as variants of the dense model (``fitness.Variants``).

    Attributes:
        model: The dense model.
        modules: The KV groups and the FFN of every block, in running order; a level keeps as many units as its number.
        masked: The kinds whose units may leave one by one.
        bounds: What candidates may cost.
        scores: Importance of all units.
        similarity: Share that a mutated mask keeps of its parent.
    """

    model: BlockModel
    modules: list[Module]
    masked: Sequence[str]
    bounds: Sequence[Limit]
    scores: Scores
    similarity: float

    @contextmanager
    def at(self, block: OpenBlock, choices: Mapping[int, Any]) -> Iterator[None]:
        """An open block with only these units of its modules."""
        with ExitStack() as stack:
            for number, kept in choices.items():
                units = self.modules[number].units
                if not kept:
                    stack.enter_context(silenced(block.module, self.model.family, units.part))
                elif len(kept) < units.count:
                    stack.enter_context(zeroed(self.model, units, kept))
            yield

    def plan(self, masks: Masks, made_by: dict[str, Any]) -> Plan:
        """What stays under a candidate; blocks of which nothing stays are dropped."""
        dropped = self.gone(masks)
        kept: dict[str, list[tuple[int, ...]]] = {kind: [() for _ in self.model.blocks] for kind in self.masked}
        for module, units in zip(self.modules, masks, strict=True):
            if module.units.kind in kept:
                kept[module.units.kind][module.units.block] = units or tuple(range(module.units.count))
        whole = {kind: tuple(blocks) for kind, blocks in kept.items()}
        return Plan(digest(self.model), len(self.model.blocks), whole, dropped=tuple(sorted(dropped)), made_by=made_by)

    def gone(self, masks: Masks) -> set[int]:
        """The blocks that left."""
        blocks = groupby(zip(self.modules, masks, strict=True), key=lambda pair: pair[0].units.block)
        return {block for block, pairs in blocks if not any(units for _, units in pairs)}

    @cached_property
    def share(self) -> float:
        """About the share of the units that stays."""
        return expected_share(self.bounds)

    @cached_property
    def counts(self) -> list[tuple[int, ...]]:
        """For every module how many units may stay, as in the paper's Table 1 and its appendix: FFNs from max(0.1, 2·share − 1.2) on."""
        found: list[tuple[int, ...]] = []
        for module in self.modules:
            count = module.units.count
            if module.units.kind not in self.masked:
                found.append((count,))
            elif module.units.kind == "ffn_channel":
                least = max(0.1, 2 * self.share - 1.2)
                steps = int((1 - least) / STEP + 1e-9)
                found.append(tuple(max(1, round((1 - STEP * down) * count)) for down in range(steps, -1, -1)))
            else:
                found.append(tuple(range(max(1, round(max(0.6, self.share) * count)), count + 1)))
        return found

    @cached_property
    def fewest_blocks(self) -> int:
        """About the paper's depths: half of the blocks' share that leaves, halved again."""
        return round((1 - (1 - self.share) / 4) * len(self.model.blocks))

    def best(self, number: int, count: int) -> tuple[int, ...]:
        """The most important units of a module."""
        units = self.modules[number].units
        if count == units.count:
            return tuple(range(count))
        order = self.scores[units.block, units.kind].argsort(descending=True, stable=True)
        return tuple(sorted(order[:count].tolist()))

    @cached_property
    def usual(self) -> list[int]:
        """For every module that some limit counts, what is nearest to the same share everywhere; the others are whole."""
        return [
            int(min((abs(count - self.share * counts[-1]), count) for count in counts)[1])
            if any(limit.table[number][0] != limit.table[number][-1] for limit in self.bounds)
            else counts[-1]
            for number, counts in enumerate(self.counts)
        ]

    def start(self, generator: torch.Generator) -> Masks:
        """Everywhere the most important units, about the same share of them."""
        return tuple(self.best(number, count) for number, count in enumerate(self.inside(self.usual, generator)))

    def inside(self, counts: list[int], generator: torch.Generator) -> list[int]:
        """Steps of random modules, among those that a limit counts which does not hold, until all do, and up again until all are nearly met or nothing more fits.

        Args:
            counts: Units of every module, 0 where its block left.
            generator: Source of chance.
        """
        counts = list(counts)
        spent = [limit.cost(tuple(counts)) for limit in self.bounds]

        def moves(by: int) -> list[tuple[int, int]]:
            """(module, its next count) of all that can go that way."""
            found = []
            for number, (now, all_counts) in enumerate(zip(counts, self.counts, strict=True)):
                others = [count for count in all_counts if (count - now) * by > 0]
                if now and others:
                    found.append((number, min(others) if by > 0 else max(others)))
            return found

        def after(move: tuple[int, int]) -> list[float]:
            number, new = move
            return [
                cost + limit.table[number][new] - limit.table[number][counts[number]]
                for cost, limit in zip(spent, self.bounds, strict=True)
            ]

        while over := [number for number, limit in enumerate(self.bounds) if spent[number] > limit.most]:
            helpful = [move for move in moves(-1) if any(after(move)[number] < spent[number] for number in over)]
            move = _one_of(helpful, generator)
            spent, counts[move[0]] = after(move), move[1]
        while any(cost < (1 - CLOSE) * limit.most for cost, limit in zip(spent, self.bounds, strict=True)):
            fits = [
                move
                for move in moves(1)
                if all(cost <= limit.most for cost, limit in zip(after(move), self.bounds, strict=True))
            ]
            if not fits:
                break
            move = _one_of(fits, generator)
            spent, counts[move[0]] = after(move), move[1]
        return counts

    def child(self, parent: Masks, chances: Mapping[str, float], generator: torch.Generator) -> Masks:
        """A mutant inside all limits."""
        blocks, gone = len(self.model.blocks), self.gone(parent)
        if _chance(chances["blocks"], generator):
            number = int(torch.randint(self.fewest_blocks, blocks + 1, (1,), generator=generator))
            before = torch.tensor(sorted(set(range(blocks)) - gone))
            gone = set(range(blocks)) - set(mutate_mask(before, blocks, number, self.similarity, generator).tolist())
        counts = []
        for module, units, choices, usual in zip(self.modules, parent, self.counts, self.usual, strict=True):
            drawn = _one_of(choices, generator) if _chance(chances["widths"], generator) else len(units)
            counts.append(0 if module.units.block in gone else drawn or usual)
        found = []
        for number, count in enumerate(self.inside(counts, generator)):
            old, length = parent[number], self.modules[number].units.count
            if count and not old:
                old = self.best(number, count)
            if 0 < count < length and (len(old) != count or _chance(chances["masks"], generator)):
                old = self._mutated(number, old, count, generator)
            found.append(() if not count else tuple(range(length)) if count == length else old)
        return tuple(found)

    def crossed(self, mother: Masks, father: Masks, generator: torch.Generator) -> Masks:
        """Every module from one of two parents, which have as many blocks; the first says which ones."""
        mixed = [a if not (a and b) or _chance(0.5, generator) else b for a, b in zip(mother, father, strict=True)]
        counts = self.inside([len(units) for units in mixed], generator)
        return tuple(
            units if len(units) == count else self._mutated(number, units, count, generator)
            for number, (units, count) in enumerate(zip(mixed, counts, strict=True))
        )

    def _mutated(self, number: int, units: tuple[int, ...], count: int, generator: torch.Generator) -> tuple[int, ...]:
        length = self.modules[number].units.count
        return tuple(mutate_mask(torch.tensor(units), length, count, self.similarity, generator).tolist())


def _chance(share: float, generator: torch.Generator) -> bool:
    return float(torch.rand(1, generator=generator)) < share


def _one_of(items: Sequence[Any], generator: torch.Generator) -> Any:
    return items[int(torch.randint(len(items), (1,), generator=generator))]


@dataclass
class Evolution:
    """Epochs over a space.

    Attributes:
        space: Of the candidates.
        pool: Token ids on which they are compared, [N, T].
        settings: The method's settings.
        team: Workers that measure, if there are any.
    """

    space: Space
    pool: Tensor
    settings: Settings
    team: Team | None = None

    @cached_property
    def lessons(self) -> list[Lesson]:
        """What the dense model says of the pool."""
        return teach(self.space.model, self.pool, self.settings.top_k)

    def measure(self, candidates: Sequence[Masks], rows: Sequence[int]) -> list[float]:
        """Fitness on some sequences of the pool, the less the better."""
        if self.team is not None:
            return self.team.measure(candidates, rows)
        if self.settings.fitness == "kl":
            return divergences(self.space, candidates, self.pool[list(rows)], [self.lessons[row] for row in rows])
        return losses(self.space, candidates, self.pool[list(rows)])

    def population(self, parents: Sequence[Masks], generator: torch.Generator) -> list[Masks]:
        """The candidates of an epoch."""
        chosen, start = self.settings, self.space.start(generator)
        if not parents:
            return [start, *(self.space.child(start, FIRST, generator) for _ in range(chosen.population - 1))]
        mutants = [self.space.child(_one_of(parents, generator), LATER, generator) for _ in range(chosen.mutants)]
        crossed = []
        for _ in range(chosen.crossovers):
            mother = _one_of(parents, generator)
            depth = len(self.space.gone(mother))
            father = _one_of([each for each in parents if len(self.space.gone(each)) == depth], generator)
            crossed.append(self.space.crossed(mother, father, generator))
        fresh = chosen.population - len(mutants) - len(crossed)
        return [*mutants, *crossed, *(self.space.child(start, FIRST, generator) for _ in range(fresh))]

    def epoch(self, number: int, parents: Sequence[Masks]) -> dict[str, Any]:
        """Children, and the best of all on the same tokens.

        Returns:
            ``parents``: the best, and ``fitness`` of each; ``tried``: how many were measured; ``tokens`` run.
        """
        generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + number)
        rows = draw_rows(self.pool, self.settings.fitness_tokens, generator)
        everyone = list(dict.fromkeys([*parents, *self.population(parents, generator)]))
        found = self.measure(everyone, rows)
        ranked = sorted(pair for pair in zip(found, everyone, strict=True) if math.isfinite(pair[0]))
        if not ranked:
            raise Problem(
                f"No candidate of epoch {number} has outputs that are finite.",
                why="the model overflows in this type when parts of it are cut.",
                fix="`dtype: float32`; finished epochs are kept.",
                code=Exit.CHECK_FAILED,
            )
        best = ranked[: self.settings.parents]
        return {
            "parents": [masks for _, masks in best],
            "fitness": [fitness for fitness, _ in best],
            "tried": len(everyone),
            "tokens": len(everyone) * len(rows) * self.pool.shape[1],
        }


def space_of(model: BlockModel, settings: Settings, scores: Scores) -> Space:
    """The candidates under the settings' limits.

    Raises:
        Problem: If the narrowest of them is over a limit.
    """
    modules = [Module(units, tuple(range(units.count + 1))) for units in find_units(model, KINDS)]
    space = Space(
        model, modules, settings.families, limits(model, modules, settings.target, bits=settings.bits), scores,
        settings.similarity,
    )  # fmt: skip
    for limit in space.bounds:
        least = limit.cost(tuple(counts[0] for counts in space.counts))
        if least > limit.most:
            raise Problem(
                f"{limit.most:,.0f} {limit.resource} are wanted, and these masks leave {least:,.0f} at least.",
                why="with all blocks in place, so much of every block stays.",
                fix="`families: [ffn_channel, kv_group]`, a larger share, or the method `search`.",
                code=Exit.OUT_OF_BUDGET,
            )
    return space


def _same_evolution(pool: Tensor, settings: Settings, model: BlockModel) -> Evolution:
    """The evolution as a worker has it, which draws no candidates."""
    return Evolution(space_of(model, settings, {}), pool, settings)


def predicted(model: BlockModel, settings: Settings) -> Surgery:
    """About the same share everywhere, as if all units were alike."""
    alike = {(units.block, units.kind): torch.zeros(units.count) for units in find_units(model, KINDS)}
    space = space_of(model, settings, alike)
    plan = space.plan(space.start(torch.Generator().manual_seed(settings.seed)), {})
    return Surgery(model, plan)


@method(
    "search_masks", title="Sub-network search by masks", paper="arXiv 2409.17372", kind="search",
    settings=Settings,
)  # fmt: skip
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Searches, cuts what the winner leaves out, and repairs the rest exactly; see ``duramen.shrink.model.carry_out``.

    Raises:
        Problem: On limits out of reach, families without a table, values that are not finite.
    """
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    blocks = BlockModel.of(model)
    fitted, pool = split(tokens, chosen.search_share)
    space = space_of(blocks, chosen, {})
    units = find_units(blocks, chosen.families)
    found = walk.memo(
        "importance",
        lambda: [[*key, score.tolist()] for key, score in importance(blocks, units, fitted, walk).items()],
    )
    space.scores = {(block, kind): torch.tensor(score) for block, kind, score in found}
    evolution, epochs = Evolution(space, pool, chosen), []
    parents: list[Masks] = []
    with team_of(blocks, lambda: partial(_same_evolution, pool, chosen), walk) as evolution.team:
        for number in range(chosen.epochs):
            epochs.append(walk.memo(f"epoch-{number:04d}", partial(evolution.epoch, number, parents)))
            parents = [tuple(map(tuple, masks)) for masks in epochs[-1]["parents"]]
    winner = parents[0]
    made_by = {
        "method": "search_masks", "settings": chosen.model_dump(mode="json"),
        "costs": costs_of(space.bounds, tuple(map(len, winner))),
        "measure": "KL" if chosen.fitness == "kl" else "loss",
        "lineage": [epoch["fitness"][0] for epoch in epochs], "tokens": sum(epoch["tokens"] for epoch in epochs),
    }  # fmt: skip
    return carry_out(space.plan(winner, made_by), blocks, tokens, chosen, walk, units)
