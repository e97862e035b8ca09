"""The search for a vision transformer that meets a frame rate on a target: widths, depth, heads, MLPs and bits per row, chosen by what a supernet's sub-networks lose on held-out images.

"Quasar-ViT" (Li et al., ICS 2024, arXiv 2407.18175) evolves architectures, checks the constraints when a candidate is made, and crosses parents block by block. Here a candidate that is too slow is repaired instead
of drawn again: its shares of eight bits become the best that the target allows, by an integer program on what every matrix alone loses at four bits, and only where no shares are enough does it get smaller.
All steps of activations are chosen anew for every candidate, since those of rarely drawn widths are stale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch.nn.functional import cross_entropy

from duramen.calibrate.walker import Memo
from duramen.hardware.cost import Fpga, Part, Target, best_engine
from duramen.hardware.fpga import Engine, read_device
from duramen.hardware.packing import best_packing
from duramen.problem import Exit, Problem
from duramen.registry import Place, method
from duramen.registry import Settings as MethodSettings
from duramen.search.constraints import Limit
from duramen.search.mutate import up_to
from duramen.search.surrogate import solve
from duramen.search.team import Team, team
from duramen.vision.cpu import measured_cpu, need_runtime
from duramen.vision.elastic import SITES, Architecture, ElasticViTForImageClassification, materialise
from duramen.vision.images import Images, in_parts
from duramen.vision.studio import Studio
from duramen.vision.supernet import Space, settle_inputs, space_of
from duramen.vision.train import logits_of

STEPS_BY = 64
"""Images by which a candidate's steps are chosen."""
DRAWS = 10
"""How often a mutant or a child is drawn anew that was seen before."""
CPU = "cpu"


class Settings(MethodSettings):
    """Settings of the search."""

    target: Annotated[float, Field(gt=0)]
    """Images per second, one after another."""
    device: Place = "zcu102"
    """What runs the network: a shipped FPGA, the path of such a data file, or `cpu` for one thread of this machine through ONNX Runtime, in whole numbers."""
    lanes: Annotated[int, Field(ge=0, multiple_of=2)] = 0
    """Rows of four bits that the engine multiplies at once, T_m; 0 for the engine that is fastest for the largest network."""
    inputs: Annotated[int, Field(ge=0)] = 0
    """Of each row at once, T_n; 0 likewise."""
    factor: Literal[2, 4] = 4
    """Products of a multiplier, if the engine is given."""
    clock: Annotated[float, Field(gt=0)] = 150e6
    """Hertz."""
    efficiency: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the memory's speed that is reached."""
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Of the rows that may have eight bits; empty for all that the supernet was trained with."""
    population: Annotated[int, Field(ge=2)] = 50
    """Candidates at the beginning."""
    generations: Annotated[int, Field(ge=0)] = 20
    """How many follow."""
    parents: Annotated[int, Field(ge=2)] = 10
    """The best of all so far, out of which mutants and children are made."""
    mutants: Annotated[int, Field(ge=0)] = 25
    """Of a generation."""
    children: Annotated[int, Field(ge=0)] = 25
    """Of a generation: every layer from either of two parents."""
    mutate_layer: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Chance of each choice of each layer to be drawn anew in a mutant."""
    mutate_whole: Annotated[float, Field(ge=0, le=1)] = 0.4
    """The same for width and depth."""
    images: Annotated[int, Field(ge=1)] = 1000
    """Held-out images on which candidates are compared, the same for all; never those of the test."""
    seed: int = 0
    """Of all that is drawn."""

    @property
    def reads_aside(self) -> bool:
        """Whether held-out images decide anything: which candidate is best."""
        return True

    @model_validator(mode="after")
    def _a_whole_engine_or_none(self) -> Settings:
        if bool(self.lanes) != bool(self.inputs):
            raise ValueError("`lanes` and `inputs` are of one engine; give both, or neither for the fastest one")
        return self


@dataclass(frozen=True)
class Heirs:
    """Sub-networks with inherited weights.

    Attributes:
        network: The supernet.
        train: Images by which steps are chosen.
        aside: Images on which they are compared.
        images: How many of these, at most.
    """

    network: ElasticViTForImageClassification
    train: Images
    aside: Images
    images: int

    @torch.no_grad()
    def measure(self, candidates: Sequence[Architecture]) -> list[dict[str, float]]:
        """The mean ``loss`` of each, and the share that it tells ``wrong``."""
        return [self._measured(prepared(self.network, each, self.train)) for each in candidates]

    def _measured(self, network: ElasticViTForImageClassification) -> dict[str, float]:
        loss = wrong = 0.0
        count = min(self.images, len(self.aside.labels))
        for pixels, labels in in_parts(self.aside, count):
            logits = logits_of(network, pixels).cpu()
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            wrong += int((logits.argmax(-1) != labels).sum())
        return {"loss": loss / count, "wrong": wrong / count}


@dataclass
class Search:
    """All that a search works with.

    Attributes:
        network: The supernet.
        space: What may be chosen.
        target: What runs the networks.
        most: Seconds of an image.
        train: Images by which steps are chosen.
        aside: Images on which candidates are compared.
        settings: The method's settings.
        losses: What every matrix of the largest network loses alone at four bits, [layers][sites]; nats.
        team: Workers that measure, if there are any.
    """

    network: ElasticViTForImageClassification
    space: Space
    target: Target
    most: float
    train: Images
    aside: Images
    settings: Settings
    losses: list[list[float]] = field(default_factory=list)
    team: Team | None = None

    def seconds(self, architecture: Architecture) -> float:
        """Of an image."""
        return self.target.seconds(architecture.parts(self.network.config))

    @property
    def heirs(self) -> partial[Heirs]:
        """Makes what measures them, here or in a worker."""
        return partial(Heirs, self.network, self.train, self.aside, self.settings.images)

    def measure(self, architectures: Sequence[Architecture]) -> list[dict[str, float]]:
        """``loss`` and ``wrong`` of sub-networks."""
        return (self.team or self.heirs()).measure(architectures)

    def alone(self) -> list[list[float]]:
        """What every matrix of the largest network loses at four bits while the others have eight; never less than nothing."""
        whole = dataclasses.replace(self.space.largest, eight=((1.0,) * 4,) * self.space.largest.depth)
        trials = [with_share(whole, layer, site, 0.0) for layer in range(whole.depth) for site in range(len(SITES))]
        least, *losses = (each["loss"] for each in self.measure([whole, *trials]))
        rises = [max(loss - least, 0.0) for loss in losses]
        return [rises[start : start + len(SITES)] for start in range(0, len(rises), len(SITES))]

    def best_shares(self, architecture: Architecture) -> Architecture | None:
        """The shares of eight bits that lose least by the sum of what matrices lose alone, inside the target; None if none are.

        Between none and all of the rows a matrix loses in proportion to the errors that stay (``row_gain``).
        """
        shares = sorted(self.space.shares)
        base = dataclasses.replace(architecture, eight=((shares[0],) * 4,) * architecture.depth)
        rest = self.seconds(base)
        if rest > self.most:
            return None
        places = [(layer, site) for layer in range(architecture.depth) for site in range(len(SITES))]
        extra = [tuple(self.seconds(with_share(base, *place, share)) - rest for share in shares) for place in places]
        lost = [
            tuple(self.losses[layer][site] * each for each in self._left(base, layer, site, shares)) for layer, site in places
        ]
        chosen = solve(tuple(lost), [Limit("seconds", rest, tuple(extra), self.most)])
        for place, level in zip(places, chosen, strict=True):
            base = with_share(base, *place, shares[level])
        return base

    def _left(self, architecture: Architecture, layer: int, site: int, shares: Sequence[float]) -> list[float]:
        """What share of the gain of eight bits a matrix goes without, for every share of its rows."""
        matrix: Any = getattr(self.network.layers[layer], SITES[site])
        gain = (
            matrix.taken(matrix.gain, rows_of(architecture, layer, site, self.network.config.head_size)).clamp_min(0).double()
        )
        whole = max(float(gain.sum()), 1e-30)
        ranked = gain.sort(descending=True).values
        return [float(ranked[int(share * len(gain) + 0.5) :].sum()) / whole for share in shares]

    def repaired(self, architecture: Architecture) -> Architecture:
        """The same, if it is fast enough; else with the best shares, and if those are too slow, smaller by the step that saves most until it is."""
        if self.seconds(architecture) <= self.most:
            return architecture
        while (found := self.best_shares(architecture)) is None:
            architecture = min(self._smaller(architecture), key=self.seconds)
        return found

    def _smaller(self, architecture: Architecture) -> list[Architecture]:
        """One step down: of heads or MLP in one layer, of depth, or of width."""
        space, found = self.space, []
        for layer in range(architecture.depth):
            heads, ratio = (
                _below(choices, there[layer])
                for choices, there in ((space.heads, architecture.heads), (space.ratios, architecture.ratios))
            )
            if heads is not None:
                found.append(dataclasses.replace(architecture, heads=_put(architecture.heads, layer, heads)))
            if ratio is not None:
                found.append(dataclasses.replace(architecture, ratios=_put(architecture.ratios, layer, ratio)))
        depth, width = _below(space.depths, architecture.depth), _below(space.widths, architecture.width)
        if depth is not None:
            found.append(cut(architecture, depth))
        if width is not None:
            found.append(dataclasses.replace(architecture, width=width))
        return found

    def mutant(self, parent: Architecture, generator: torch.Generator) -> Architecture:
        """A parent some of whose choices are drawn anew."""
        settings, fresh, depths = self.settings, self.space.draw(generator, deepest=True), self.space.depths

        def anew(chance: float) -> bool:
            return float(torch.rand(1, generator=generator)) < chance

        width = fresh.width if anew(settings.mutate_whole) else parent.width
        depth = depths[up_to(len(depths), generator)] if anew(settings.mutate_whole) else parent.depth
        layers = []
        for layer in range(depth):
            mine, other = (parent if layer < parent.depth else fresh).layer(layer), fresh.layer(layer)
            heads = (other if anew(settings.mutate_layer) else mine)[0]
            ratio = (other if anew(settings.mutate_layer) else mine)[1]
            eight = tuple(new if anew(settings.mutate_layer) else old for old, new in zip(mine[2], other[2], strict=True))
            layers.append((heads, ratio, eight))
        return Architecture.of(width, layers)

    def child(self, parents: Sequence[Architecture], generator: torch.Generator) -> Architecture:
        """Every layer, the width and the depth from either of two parents; layers that only the deeper has are its own."""

        def either() -> Architecture:
            return parents[up_to(2, generator)]

        width, depth = either().width, either().depth
        deeper = max(parents, key=lambda each: each.depth)
        picked = [either() for _ in range(depth)]
        return Architecture.of(
            width, [(each if number < each.depth else deeper).layer(number) for number, each in enumerate(picked)]
        )

    def first(self) -> list[Architecture]:
        """The population: the largest with all layers alike of every width and depth that can be made fast enough, and others at random."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        most = self.space.largest
        alike = [
            self.repaired(cut(dataclasses.replace(most, width=width), depth))
            for width in sorted(self.space.widths, reverse=True)
            for depth in sorted(self.space.depths, reverse=True)
        ]
        count = self.settings.population
        return self.distinct(alike[: count // 2], (self.space.draw(generator) for _ in range(DRAWS * count)), count, ())

    def distinct(
        self, begun: Sequence[Architecture], drawn: Iterable[Architecture], count: int, seen: Iterable[Architecture]
    ) -> list[Architecture]:
        """So many candidates that are fast enough, fit the target, and are new."""
        old, found = set(seen), dict.fromkeys(begun)
        for each in drawn:
            if len(found) >= count:
                break
            candidate = self.repaired(each)
            if candidate not in old and not self.target.excess(candidate.parts(self.network.config)):
                found[candidate] = None
        return list(found)

    def next(self, number: int, tried: Sequence[dict[str, Any]]) -> list[Architecture]:
        """The candidates of a generation."""
        settings = self.settings
        generator = torch.Generator().manual_seed(1_000_003 * settings.seed + number)
        seen = [Architecture.read(each["architecture"]) for each in tried]
        ranked = sorted(range(len(tried)), key=lambda place: (tried[place]["loss"], place))[: settings.parents]
        elites = [seen[place] for place in ranked]
        mutants = (self.mutant(elites[up_to(len(elites), generator)], generator) for _ in range(DRAWS * settings.mutants))
        found = self.distinct((), mutants, settings.mutants, seen)
        draws = DRAWS * settings.children if len(elites) > 1 else 0
        pairs = (torch.randperm(len(elites), generator=generator)[:2].tolist() for _ in range(draws))
        children = (self.child([elites[place] for place in pair], generator) for pair in pairs)
        return self.distinct(found, children, settings.mutants + settings.children, seen)


def evolve(search: Search, memo: Memo, tell: Callable[[int, float], None]) -> list[dict[str, Any]]:
    """Everything that was tried, in order: ``architecture``, ``seconds``, ``loss``, ``wrong`` and ``generation``; finished generations are kept."""
    search.losses = memo("alone", search.alone)
    tried: list[dict[str, Any]] = []
    for number in range(search.settings.generations + 1):
        tried += memo(f"generation-{number:04d}", partial(_generation, search, number, tried))
        tell(number, min(each["loss"] for each in tried))
    best = Architecture.read(min(tried, key=lambda each: each["loss"])["architecture"])
    last = search.best_shares(best)
    if last is not None and last not in {Architecture.read(each["architecture"]) for each in tried}:
        tried += memo("last", lambda: _tried(search, [last], search.settings.generations + 1))
    return tried


def _generation(search: Search, number: int, tried: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return _tried(search, search.next(number, tried) if number else search.first(), number)


def _tried(search: Search, candidates: Sequence[Architecture], generation: int) -> list[dict[str, Any]]:
    return [
        {"architecture": each.as_dict(), "seconds": search.seconds(each), "generation": generation} | measured
        for each, measured in zip(candidates, search.measure(candidates), strict=True)
    ]


def prepared(
    network: ElasticViTForImageClassification, architecture: Architecture, images: Images
) -> ElasticViTForImageClassification:
    """A sub-network on its own with inherited weights, its steps of activations chosen for it."""
    found = materialise(network, architecture)
    settle_inputs(found, images, STEPS_BY)
    return found


def front(tried: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that none beats in both seconds and loss, from the fastest."""
    found: list[dict[str, Any]] = []
    for each in sorted(tried, key=lambda each: (each["seconds"], each["loss"])):
        if not found or each["loss"] < found[-1]["loss"]:
            found.append(each)
    return found


def rows_of(architecture: Architecture, layer: int, site: int, head_size: int) -> int:
    """Of a matrix."""
    inner = architecture.heads[layer] * head_size
    return (3 * inner, architecture.width, architecture.hidden[layer], architecture.width)[site]


def with_share(architecture: Architecture, layer: int, site: int, share: float) -> Architecture:
    """The same with another share of eight bits in one matrix."""
    eight = [list(each) for each in architecture.eight]
    eight[layer][site] = share
    return dataclasses.replace(architecture, eight=tuple(map(tuple, eight)))


def cut(architecture: Architecture, depth: int) -> Architecture:
    """Its first layers."""
    return Architecture.of(architecture.width, [architecture.layer(number) for number in range(depth)])


def _below(choices: Sequence[float], there: float) -> Any:
    """The largest smaller choice; None if there is none."""
    return max((each for each in choices if each < there), default=None)


def _put(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def target_of(settings: Settings, network: ElasticViTForImageClassification, space: Space, memo: Memo) -> Target:
    """What the settings say runs the networks; what is timed on this machine is timed once a run.

    Raises:
        Problem: If there is no such device, or its engine cannot hold the products or the largest network.
    """
    if settings.device == CPU:
        here = measured_cpu(network.config)
        kinds = [part for each in space.kinds() for part in each.parts(network.config)]
        return here.retold(kinds, memo("timed", lambda: here.timed(kinds)))
    device, parts = read_device(settings.device), space.largest.parts(network.config)
    bits = network.config.activation_bits
    engine = Engine(clock=settings.clock, efficiency=settings.efficiency, activation_bits=bits)
    if not settings.lanes:
        return Fpga(device, best_engine(parts, device, engine))
    best_packing(settings.factor, bits, device.multiplier)
    tokens = 2 if settings.factor == 4 else 1
    given = dataclasses.replace(engine, lanes=settings.lanes, inputs=settings.inputs, factor=settings.factor, tokens=tokens)
    found = Fpga(device, given)
    if found.excess(parts):
        found = Fpga(device, dataclasses.replace(given, streams=True))
    if found.excess(parts):
        raise Problem(
            f"The engine does not fit {device.name} with the largest network.",
            why=f"it takes {', '.join(found.excess(parts))}.",
            fix="fewer `lanes` or `inputs`, or 0 for the fastest engine that fits.",
            code=Exit.OUT_OF_BUDGET,
        )
    return found


def _bound(target: Target, parts: Sequence[Part]) -> str:
    """What holds a network up on an FPGA, in words."""
    if target.source == "measured":
        return ""
    products = target.describe(parts)["products"]
    loading = sum(each["seconds"] for each in products if each["load"] > each["compute"])
    share = loading / sum(each["seconds"] for each in products)
    return f"; {share:.0%} of its time goes by in products that wait for weights from outside, the rest in those that the multipliers hold up"


def rehearse(studio: Studio, settings: Settings) -> None:
    """Stops where nothing is fast enough; this machine is not timed."""
    if settings.device == CPU:
        space_of(studio.model)
        need_runtime()
    else:
        begin(studio, settings)


def begin(studio: Studio, settings: Settings) -> Search:
    """All that a search works with.

    Raises:
        Problem: If the model is no supernet, or none of its sub-networks is fast enough.
    """
    network = studio.model
    space = space_of(network)
    if settings.shares:
        space = space.model_copy(update={"shares": settings.shares})
    target = target_of(settings, network, space, studio.memo)
    search = Search(network, space, target, 1 / settings.target, studio.train, studio.aside, settings)
    fastest = search.seconds(space.smallest)
    if fastest > search.most:
        raise Problem(
            f"No sub-network reaches {settings.target:,.1f} images per second on {target.name}.",
            why=f"the fastest reaches {1 / fastest:,.1f}{_bound(target, space.smallest.parts(network.config))}.",
            fix=f"a `target` of at most {math.floor(10 / fastest) / 10}, or a supernet with smaller choices.",
            code=Exit.OUT_OF_BUDGET,
        )
    return search


@method(
    "vit_search",
    title="Search for a vision transformer on a target",
    paper="arXiv 2407.18175",
    kind="images",
    settings=Settings,
    rehearse=rehearse,
)
def apply(studio: Studio, settings: Settings) -> dict[str, Any]:
    """Searches a supernet, and goes on with the sub-network that loses least at the frame rate.

    Raises:
        Problem: If the model is no supernet, or none of its sub-networks is fast enough.
    """
    search = begin(studio, settings)
    network, space, target = search.network, search.space, search.target
    device = next(network.parameters()).device
    with team(lambda: search.heirs, studio.workers, studio.address, device) as search.team:
        tried = evolve(search, studio.memo, studio.told)
    best = front(tried)
    architecture = Architecture.read(best[-1]["architecture"])
    studio.network = prepared(network, architecture, studio.train)
    found = {
        "target": settings.target, "source": target.source, "on": target.name, "all_fast": search.seconds(space.largest) <= search.most,
        "described": target.describe(architecture.parts(network.config)), "tried": tried, "front": best, "chosen": best[-1],
        "alone": search.losses, "bits": {name: matrix.integers(share)[0].bits for name, matrix, share, _ in studio.network.linears()},
        "multiply_adds": {"largest": space.largest.products(network.config), "chosen": architecture.products(network.config)},
    }  # fmt: skip
    return {"search": found}
