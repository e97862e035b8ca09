"""What a network costs on a target, by the products that it is made of: modelled for an FPGA, or looked up in a table that was measured on this machine.

Who asks says which products run together; a target knows no network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, Protocol

from duramen.hardware.fpga import Device, Engine, Shape, network_cycles, resources, shape_cycles, tiles, usable
from duramen.hardware.packing import Factor, best_packing, packing_table
from duramen.problem import Exit, Problem

Part = tuple[Shape, ...]
"""Products that run together, with all that is between them."""
FACTORS: tuple[Factor, ...] = (2, 4)
SIDES = (8, 16, 24, 32, 48, 64, 96, 128)
"""Lanes and inputs of the engines that are tried."""


class Target(Protocol):
    """Something that runs networks."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def source(self) -> Literal["modelled", "measured"]:
        """Where its seconds come from."""

    def seconds(self, parts: Sequence[Part]) -> float:
        """Of one image."""

    def excess(self, parts: Sequence[Part]) -> list[str]:
        """What it has not enough of, in words."""

    def describe(self, parts: Sequence[Part]) -> dict[str, Any]:
        """For the report: what it is, what a network takes of it, and ``products``, each with its seconds and multiply-adds."""


@dataclass(frozen=True)
class Fpga:
    """An engine on a device.

    Attributes:
        device: The part.
        engine: What is built on it.
    """

    device: Device
    engine: Engine
    source: Literal["modelled", "measured"] = "modelled"

    @property
    def name(self) -> str:
        """Of the device."""
        return self.device.name

    def cycles(self, parts: Sequence[Part]) -> int:
        """Of one image."""
        shapes = [shape for part in parts for shape in part]
        return network_cycles(shapes, self.engine, self.engine.bits_per_cycle(self.device))

    def seconds(self, parts: Sequence[Part]) -> float:
        """Of one image."""
        return self.cycles(parts) / self.engine.clock

    def excess(self, parts: Sequence[Part]) -> list[str]:
        """Resources that the device has not."""
        return resources([shape for part in parts for shape in part], self.engine).over(self.device)

    def describe(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Device, engine, the resources that it takes and those that can be taken, and products one by one with what bounds each."""
        shapes, bits = [shape for part in parts for shape in part], self.engine.bits_per_cycle(self.device)
        products = []
        for shape in shapes:
            cut = tiles(shape, self.engine, bits)
            products.append(
                dataclasses.asdict(shape)
                | {"seconds": shape_cycles(shape, self.engine, bits) / self.engine.clock, "multiply_adds": shape.products}
                | {"pairs": shape.pairs, "load": cut.load, "compute": cut.compute, "store": cut.store}
            )
        return {
            "device": self.device.model_dump(), "engine": dataclasses.asdict(self.engine), "products": products,
            "bits_per_cycle": bits, "takes": dataclasses.asdict(resources(shapes, self.engine)), "there": dataclasses.asdict(usable(self.device)),
        }  # fmt: skip


@dataclass
class Measured:
    """A table of parts; each kind is timed when it is first asked for, those that are asked for together in turns.

    Attributes:
        name: Of what was measured.
        time: Gives the seconds of parts of which only the sizes count.
        rest: Seconds that every network takes beside its parts.
        table: What was timed so far.
    """

    name: str
    time: Callable[[Sequence[Part]], Sequence[float]]
    rest: float = 0.0
    table: dict[Part, float] = field(default_factory=dict)
    source: Literal["modelled", "measured"] = "measured"

    def seconds(self, parts: Sequence[Part]) -> float:
        """Of one image: the sum of its parts."""
        keys = [_sizes(part) for part in parts]
        missing = [key for key in dict.fromkeys(keys) if key not in self.table]
        if missing:
            self.table |= dict(zip(missing, self.time(missing), strict=True))
        return self.rest + sum(self.table[key] for key in keys)

    def timed(self, parts: Sequence[Part]) -> dict[str, Any]:
        """All that these parts take here, as JSON."""
        self.seconds(parts)
        return {"name": self.name, "rest": self.rest, "seconds": [self.table[_sizes(part)] for part in parts]}

    def retold(self, parts: Sequence[Part], kept: dict[str, Any]) -> Measured:
        """The same with what ``timed`` said of these parts, maybe earlier."""
        table = dict(zip(map(_sizes, parts), kept["seconds"], strict=True))
        return dataclasses.replace(self, name=kept["name"], rest=kept["rest"], table=table)

    def excess(self, parts: Sequence[Part]) -> list[str]:
        """Nothing; a processor runs whatever it is given."""
        return []

    def describe(self, parts: Sequence[Part]) -> dict[str, Any]:
        """How many kinds of parts were timed, and the parts one by one."""
        products = [
            {"seconds": self.seconds([part]) - self.rest, "multiply_adds": sum(shape.products for shape in part)}
            for part in parts
        ]
        return {"timed": len(self.table), "products": products}


def _sizes(part: Part) -> Part:
    """What of a part decides its time here, where all rows run in eight bits."""
    return tuple(dataclasses.replace(shape, eight=0.0) for shape in part)


def best_engine(parts: Sequence[Part], device: Device, engine: Engine) -> Engine:
    """The engine that runs a network in the fewest cycles among those that fit the device; activations are streamed only where none fits with them on the chip.

    Args:
        parts: Of the network.
        device: The part.
        engine: Clock, efficiency and activation bits are its.

    Raises:
        Problem: If none fits, or no multiplier holds two products.
    """
    shapes = [shape for part in parts for shape in part]
    best_packing(FACTORS[0], engine.activation_bits, device.multiplier)
    factors = [factor for factor in FACTORS if packing_table(factor, engine.activation_bits, device.multiplier)]
    for streams in (engine.streams, True):
        found = []
        for lanes, inputs, factor in product(SIDES, SIDES, factors):
            tokens = 2 if factor == 4 else 1
            each = dataclasses.replace(engine, lanes=lanes, inputs=inputs, tokens=tokens, factor=factor, streams=streams)
            takes = resources(shapes, each)
            if not takes.over(device):
                found.append((network_cycles(shapes, each, each.bits_per_cycle(device)), takes.dsps, lanes, each))
        if found:
            return min(found, key=lambda each: each[:3])[-1]
    over = resources(shapes, dataclasses.replace(engine, lanes=SIDES[0], inputs=SIDES[0], streams=True)).over(device)
    raise Problem(
        f"No engine on {device.name} runs the network.",
        why=f"even the smallest takes {', '.join(over)}.",
        fix="a smaller network, or a larger device.",
        code=Exit.OUT_OF_BUDGET,
    )
