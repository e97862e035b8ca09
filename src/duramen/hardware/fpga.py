"""An FPGA that runs the matrices of a vision transformer with rows of four and of eight bits: cycles by a closed form and by simulation, and the resources of its engine.

"Quasar-ViT" (Li et al., ICS 2024, arXiv 2407.18175) has such a model and prints little of it; this one is derived (method sheet, 2.4 to 2.6), and what it says is modelled, never measured. Weights of a tile are
loaded while the tile before is computed, results are stored while the next row of tiles is. A row of eight bits takes two lanes; lanes come in pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from duramen.hardware.packing import Factor
from duramen.problem import Problem

Kind = Literal["linear", "attention"]
LUT_PER_DSP, LUT_PER_PRODUCT, LUT_PER_SUM, LUT_CONTROL = 15, 52, 12, 20_000
"""Lookup tables of a packed multiplier, of a product of its own, of a product that is summed outside, and of control; by yosys for a part of this kind, and control by assumption."""
FLIP_FLOPS_PER_DSP = 104
MOST_DSP, MOST_LUT = 0.9, 0.7
"""Shares of a part that can be filled."""
RAM_SHAPES = ((72, 512), (36, 1024), (18, 2048), (9, 4096), (4, 8192), (2, 16384), (1, 32768))
"""Widths and depths of a block of memory."""
Positive = Annotated[int, Field(gt=0)]


class Device(BaseModel):
    """A part, from a data file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    part: str
    dsps: Positive
    """Multipliers."""
    luts: Positive
    """Lookup tables."""
    flip_flops: Positive
    ramb36: Positive
    """Blocks of memory of 36 Kbit."""
    bytes_per_second: Annotated[float, Field(gt=0)]
    """Of the memory outside."""
    multiplier: tuple[Positive, Positive]
    """Widths of a multiplier's ports, the wide one first."""
    accumulator: Positive
    """Bits of a multiplier's own sum."""

    @field_validator("multiplier")
    @classmethod
    def _wide_first(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] < value[1]:
            raise ValueError("the wide port comes first")
        return value


def read_device(name: str) -> Device:
    """A device by the name of a shipped data file, or by a path.

    Raises:
        Problem: If there is none, or a field is missing or wrong, which is named.
    """
    folder = Path(__file__).parent / "devices"
    file = next((each for each in (folder / f"{name}.json", Path(name)) if each.is_file()), None)
    if file is None:
        known = ", ".join(sorted(each.stem for each in folder.glob("*.json")))
        raise Problem(
            f"There is no device `{name}`.",
            why=f"the shipped ones are: {known}.",
            fix="one of these, or the path of a data file.",
        )
    try:
        return Device.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("the file",), "msg": str(error)}
        raise Problem(
            f"{file} does not describe a device: `{'.'.join(map(str, first['loc']))}`.",
            why=f"{first['msg']}.",
            fix=f"the fields of {folder.name}/zcu102.json.",
        ) from error


@dataclass(frozen=True)
class Engine:
    """What is built on a device.

    Attributes:
        lanes: Rows of four bits at once, T_m; even.
        inputs: Of each row at once, T_n.
        tokens: At once, T_t.
        factor: Products of one multiplier.
        dsp_share: Share of the products on multipliers; the others are built of lookup tables.
        activation_bits: Of inputs.
        output_bits: Of outputs that go to the memory outside; 0 for as many as inputs have, more where sums leave before they are rounded.
        clock: Hertz.
        efficiency: Share of the memory's speed that is reached.
        streams: Whether activations come from and go to the memory outside, tile by tile; otherwise they stay on the chip.
        prefetch: Whether a row of tiles is loaded while the one before is still computed.
    """

    lanes: int = 64
    inputs: int = 64
    tokens: int = 2
    factor: Factor = 4
    dsp_share: float = 1.0
    activation_bits: int = 6
    output_bits: int = 0
    clock: float = 150e6
    efficiency: float = 0.8
    streams: bool = False
    prefetch: bool = True

    def bits_per_cycle(self, device: Device) -> int:
        """Of the memory outside.

        Raises:
            Problem: If it is not even one.
        """
        found = int(8 * device.bytes_per_second / self.clock * self.efficiency)
        if not found:
            raise Problem(
                f"{device.name}'s memory of {device.bytes_per_second:g} bytes per second gives not one bit in a cycle of {self.clock:g} Hz.",
                why="no weight would ever arrive.",
                fix="`bytes_per_second` in bytes, as 19.2e9, and `clock` in hertz.",
            )
        return found


@dataclass(frozen=True)
class Shape:
    """A product of matrices, W [M, K] by K features of so many tokens.

    Attributes:
        rows: M.
        features: K.
        tokens: T.
        eight: Share of the rows that have eight bits; the others have four.
        kind: ``attention``: both sides are activations, which are on the chip, and a multiplier holds two products.
        times: How often it runs, as heads do.
    """

    rows: int
    features: int
    tokens: int
    eight: float = 0.0
    kind: Kind = "linear"
    times: int = 1

    @property
    def products(self) -> int:
        """Multiply-adds."""
        return self.rows * self.features * self.tokens * self.times

    @property
    def pairs(self) -> int:
        """Pairs of lanes: one for a row of eight bits, or for two of four."""
        if self.kind == "attention":
            return ceil(self.rows / 2)
        eight = int(self.eight * self.rows + 0.5)
        return eight + ceil((self.rows - eight) / 2)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut, and what a tile takes.

    Attributes:
        rows: Of tiles, n_m.
        columns: Of tiles, n_k.
        load: Cycles to load a tile's weights, and its activations if they are streamed.
        compute: Cycles of a tile.
        store: Cycles to store a row of tiles.
    """

    rows: int
    columns: int
    load: int
    compute: int
    store: int


def tiles(shape: Shape, engine: Engine, bits_per_cycle: int) -> Tiles:
    """Cuts a product for an engine."""
    at_once = 1 if shape.kind == "attention" else engine.tokens
    columns, compute = ceil(shape.features / engine.inputs), ceil(shape.tokens / at_once)
    if shape.kind == "attention":
        return Tiles(ceil(shape.pairs / (engine.lanes // 2)), columns, 0, compute, 0)
    moved = shape.tokens if engine.streams else 0
    load = ceil((4 * engine.lanes + moved * engine.activation_bits) * engine.inputs / bits_per_cycle)
    store = ceil(moved * (engine.output_bits or engine.activation_bits) * engine.lanes / bits_per_cycle)
    return Tiles(ceil(shape.pairs / (engine.lanes // 2)), columns, load, compute, store)


def closed_cycles(cut: Tiles, *, prefetch: bool = True) -> int:
    """Cycles of a product whose loads, products and stores overlap, by a formula."""
    longest = max(cut.load, cut.compute)
    if prefetch:
        first = cut.load + (cut.columns - 1) * longest + cut.compute
        return first + (cut.rows - 1) * max(cut.columns * longest, cut.store) + cut.store
    row = cut.load + (cut.columns - 1) * longest + cut.compute
    return row + (cut.rows - 1) * max(row, cut.store) + cut.store


def simulated_cycles(cut: Tiles, *, prefetch: bool = True) -> int:
    """The same, event by event.

    A load begins when the one before has ended and the product that used its buffer has; a product when its load and the one before have ended and, on the first tile of a row, the store of
    two rows before; a store when the last product of its row and the store before have ended. Without prefetch the first load of a row also waits for the last product of the row before.
    """
    load_end = store_end = 0
    computed: list[int] = []
    stored: list[int] = []
    for row in range(cut.rows):
        for column in range(cut.columns):
            begin = max(load_end, computed[-2] if len(computed) > 1 else 0)
            if not prefetch and column == 0 and computed:
                begin = max(begin, computed[-1])
            load_end = begin + cut.load
            waits = [load_end, computed[-1] if computed else 0]
            if column == 0 and row > 1:
                waits.append(stored[row - 2])
            computed.append(max(waits) + cut.compute)
        store_end = max(computed[-1], store_end) + cut.store
        stored.append(store_end)
    return store_end


def network_cycles(shapes: Sequence[Shape], engine: Engine, bits_per_cycle: int) -> int:
    """Of one image through all products, one after another, as heads of attention are."""
    return sum(shape_cycles(shape, engine, bits_per_cycle) for shape in shapes)


@cache
def shape_cycles(shape: Shape, engine: Engine, bits_per_cycle: int) -> int:
    """Of one product, as often as it runs."""
    return shape.times * closed_cycles(tiles(shape, engine, bits_per_cycle), prefetch=engine.prefetch)


def frames_per_second(shapes: Sequence[Shape], engine: Engine, device: Device) -> float:
    """Modelled, images one after another; norms, softmax and activation functions are taken to run beside it."""
    return engine.clock / network_cycles(shapes, engine, engine.bits_per_cycle(device))


def transformer_shapes(
    width: int,
    depth: int,
    heads: int,
    hidden: int,
    *,
    tokens: int = 197,
    patch_features: int = 768,
    classes: int = 1000,
    eight: float = 0.0,
) -> list[Shape]:
    """The products of a vision transformer with a class token and heads of width/heads; patches and head of eight bits.

    Args:
        width: D.
        depth: Layers.
        heads: Of attention.
        hidden: Of the MLP.
        tokens: T, the class token among them.
        patch_features: Pixels of a patch, over all channels.
        classes: Of the head.
        eight: Share of the rows of layers that have eight bits.
    """
    head = width // heads
    linear = ((3 * width, width), (width, width), (hidden, width), (width, hidden))
    layer = [Shape(rows, features, tokens, eight) for rows, features in linear]
    layer += [
        Shape(tokens, head, tokens, kind="attention", times=heads),
        Shape(head, tokens, tokens, kind="attention", times=heads),
    ]
    return [Shape(width, patch_features, tokens - 1, 1.0), *layer * depth, Shape(classes, width, 1, 1.0)]


@dataclass(frozen=True)
class Resources:
    """What an engine takes of a device."""

    dsps: int
    luts: int
    flip_flops: int
    ramb36: int

    def over(self, device: Device) -> list[str]:
        """What does not fit, in words."""
        names = ("multipliers", "lookup tables", "flip-flops", "blocks of memory")
        limits = zip(names, astuple(self), astuple(usable(device)), strict=True)
        return [f"{need:,} {name} of {there:,}" for name, need, there in limits if need > there]


def usable(device: Device) -> Resources:
    """What an engine may take of a device."""
    return Resources(int(MOST_DSP * device.dsps), int(MOST_LUT * device.luts), device.flip_flops, device.ramb36)


def memory_blocks(width: int, depth: int) -> int:
    """Blocks of 36 Kbit for a buffer of so many bits and words, by the best of their shapes."""
    return min(ceil(width / wide) * ceil(depth / deep) for wide, deep in RAM_SHAPES)


def resources(shapes: Sequence[Shape], engine: Engine) -> Resources:
    """What an engine takes that runs these products.

    With weights that stay while tokens pass, sums of all tokens of a row of tiles are kept at once, twice; activations of the widest product are on the chip, or twice the tile of one that is streamed.
    """
    products = engine.lanes * engine.inputs * engine.tokens
    dsps = ceil(engine.dsp_share * products / engine.factor)
    of_tables = products - round(engine.dsp_share * products)
    summed = of_tables + (products - of_tables if engine.factor == 4 else 0)
    luts = LUT_PER_DSP * dsps + LUT_PER_PRODUCT * of_tables + LUT_PER_SUM * summed + LUT_CONTROL
    linear = [shape for shape in shapes if shape.kind == "linear"]
    passes = max(ceil(shape.tokens / engine.tokens) for shape in linear)
    columns = max(ceil(shape.features / engine.inputs) for shape in linear)
    longest = max(shape.features for shape in linear)
    sum_bits = 8 + engine.activation_bits + (longest - 1).bit_length()
    activations = memory_blocks(
        engine.activation_bits * engine.tokens * engine.inputs, passes * (1 if engine.streams else columns)
    )
    sums = memory_blocks(sum_bits * engine.tokens * engine.lanes, passes)
    return Resources(
        dsps,
        luts,
        FLIP_FLOPS_PER_DSP * dsps + 2 * 4 * engine.lanes * engine.inputs,
        (2 if engine.streams else 1) * activations + 2 * sums,
    )
