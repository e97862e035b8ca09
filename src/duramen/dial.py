"""One dial: from a target and the program that will run the model to a recipe, with the reason of every step.

Sizes are counted before anything runs, from the shapes of the matrices and the bits that each program stores; the gentlest means that reaches the target is taken: sixteen bits, eight, four and eight mixed,
four, and only then fewer channels and heads, down to half of the blocks. Speed is measured on this machine: a table of what every block costs at every width decides how much leaves (``search``), and
the result is timed against the dense model. What was reached is compared with what was asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

from duramen.export.gguf import gguf_shapes
from duramen.families.model import BlockModel
from duramen.problem import Exit, Problem
from duramen.sizes import is_size, read_size

Place = Literal["cpu", "gpu", "llama.cpp", "vllm", "edge"]
NEAR = 1.05
"""What is reached may be so much more than what was asked for."""
LEAST = 0.5
"""Share of the parameters inside the blocks that stays at least; below it too little of a model is left."""
MARGIN = 0.995
"""Of what is cut to: channels and heads leave in whole numbers."""
HEADER = 100
"""Bytes of its name and shape beside a tensor in a file."""
CALIBRATION = {"sequences": 32, "length": 512}


@dataclass(frozen=True)
class Target:
    """What is asked for.

    Attributes:
        kind: ``size`` (a share of the model's, or bytes) or ``speed`` (a factor).
        value: The share, bytes or factor.
        text: As it was written.
    """

    kind: Literal["size", "speed"]
    value: float
    text: str

    def say(self, value: float) -> str:
        """What is asked for, or was reached, with its unit."""
        return f"{value:.3g} times faster" if self.kind == "speed" else f"{value:,.0f} bytes"

    @classmethod
    def read(cls, text: str) -> Target:
        """Reads `0.5x`, `4GB` or `2x-faster`.

        Raises:
            Problem: If it reads otherwise.
        """
        faster = re.fullmatch(r"(\d+(?:\.\d+)?)x-faster", text)
        share = re.fullmatch(r"(0?\.\d+)x", text)
        if faster and float(faster[1]) > 1:
            return cls("speed", float(faster[1]), text)
        if share and float(share[1]) > 0:
            return cls("size", float(share[1]), text)
        if is_size(text):
            return cls("size", read_size(text, "--target"), text)
        raise Problem(
            f"`{text}` is no target.", why="it is a share of the model's size below one, a size, or a factor of speed above one.",
            fix="`0.5x`, `200MB`, `4GB` or `2x-faster`.",
        )  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """One means of making a model smaller.

    Attributes:
        says: What it is and why it comes at this place.
        bytes: Predicted, of the result.
        steps: Of a recipe.
    """

    says: str
    bytes: float
    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """What the dial came to.

    Attributes:
        recipe: To run.
        reasons: Of its steps, in words.
        target: What was asked for.
        most: Bytes that are allowed, for a size.
    """

    recipe: dict[str, Any]
    reasons: list[str]
    target: Target
    most: float | None = None


@dataclass(frozen=True)
class Counts:
    """What there is to store.

    Attributes:
        coded: Weights of the layers inside the blocks.
        rest: Of other matrices, embedding and head; a shared one once.
        head: Of a head that shares the embedding's weights, which some formats store again.
        vectors: Norms and biases.
        stored: Bytes of the source's own tensors.
        tensors: How many there are.
        inputs: Numbers of inputs of all layers.
    """

    coded: int
    rest: int
    head: int
    vectors: int
    stored: int
    tensors: int
    inputs: frozenset[int]

    @classmethod
    def of(cls, model: BlockModel) -> Counts:
        """Counts a model that was opened from its folder."""
        assert model.checkpoint is not None
        layers = {name: model.shape(name) for name in model.layer_names()}
        parameters = {name: parameter for name, parameter in model.network.named_parameters() if not _is_layer(name, layers)}
        matrices = sum(each.numel() for each in parameters.values() if each.ndim > 1)
        head = model.network.get_output_embeddings()  # type: ignore[operator]
        shared = head is not None and head.weight is model.network.get_input_embeddings().weight  # type: ignore[operator]
        return cls(
            sum(map(prod, layers.values())), matrices, head.weight.numel() if shared else 0,
            sum(each.numel() for each in parameters.values() if each.ndim < 2),
            sum((model.checkpoint.folder / file).stat().st_size for file in set(model.checkpoint.files.values())),
            len(model.checkpoint.names), frozenset(inputs for _, inputs in layers.values()),
        )  # fmt: skip

    def bytes(self, coded: float, rest: float, *, share: float = 1.0, again: bool = False) -> float:
        """Of a file with so many bits a weight, of which a share of the coded ones stays; ``again`` if a shared head is stored twice."""
        return (
            self.coded * share * coded + (self.rest + self.head * again) * rest + 32 * self.vectors
        ) / 8 + HEADER * self.tensors

    @property
    def weights(self) -> int:
        """All of them."""
        return self.coded + self.rest + self.vectors

    @property
    def whole(self) -> float:
        """Bytes at 16 bits a weight."""
        return 2.0 * self.weights


def _is_layer(name: str, layers: dict[str, Any]) -> bool:
    return name.removesuffix(".weight") in layers


def _exported(form: str, kind: str = "auto") -> dict[str, Any]:
    return {"method": "export", "form": form, "type": kind}


def _cut(share: float) -> tuple[float, dict[str, Any]]:
    """The share of the weights inside the blocks that stays, at least ``LEAST``, and the step that cuts to it."""
    share = max(LEAST, min(1.0, share))
    return share, {"method": "search", "target": {"block_parameters": round(share, 4)}}


def _cut_and_rounded(share: float) -> str:
    return f"{share:.1%} of the weights inside the blocks stay, by search, and are rounded to 4 bits"


def llama_cpp(counts: Counts, most: float, tokenizer: int) -> Iterator[Rung]:
    """Rungs of GGUF, whose blocks of 32 weights have one 16-bit step: 8 bits are 8.5, and 4 are 4.5."""
    there = tokenizer / 2  # as GGUF keeps it

    def size(coded: float, rest: float, share: float = 1.0) -> float:
        return counts.bytes(coded, rest, share=share) + there

    yield Rung("16 bits a weight, which changes nothing", size(16, 16), [_exported("gguf", "f16")])
    if any(inputs % 32 for inputs in counts.inputs):
        return
    eight_bits = _exported("gguf", "q8_0")
    yield Rung("8 bits a weight (Q8_0)", size(8.5, 8.5), [eight_bits])
    left = (most - size(0, 8.5)) * 8 / counts.coded
    if left >= 4.6:
        bits = min(8.5, left * 0.999)
        mixed = {"method": "gptq", "format": "W4 g32", "mean_bits": round(bits, 3), "widths": [4, 8]}
        says = f"4 and 8 bits (Q4_0 and Q8_0), {bits:.2f} a weight in the mean: layers that suffer most from 4 bits keep 8"
        yield Rung(says, size(bits, 8.5), [mixed, eight_bits])
    four_bits = {"method": "gptq", "format": "W4 g32"}
    yield Rung("4 bits a weight (Q4_0), embeddings 8", size(4.5, 8.5), [four_bits, eight_bits])
    share, cut = _cut(MARGIN * left / 4.5)
    yield Rung(_cut_and_rounded(share), size(4.5, 8.5, share), [cut, four_bits, eight_bits])


def vllm(counts: Counts, most: float, tokenizer: int) -> Iterator[Rung]:
    """Rungs of compressed-tensors, which leaves embeddings as they are stored."""
    stored, packed = 8 * counts.stored / counts.weights, _exported("compressed")
    eight_bits = {"method": "gptq", "format": "W8 row"}
    yield Rung("8 bits a weight, a step for every row", counts.bytes(8, stored), [eight_bits, packed])
    group = next((size for size in (128, 64, 32) if not any(inputs % size for inputs in counts.inputs)), None)
    if group is None:
        return
    four, four_bits = 4 + 16 / group, {"method": "gptq", "format": f"W4 g{group}"}
    yield Rung(f"4 bits a weight in groups of {group}", counts.bytes(four, stored), [four_bits, packed])
    share, cut = _cut(MARGIN * (most - counts.bytes(0, stored)) * 8 / counts.coded / four)
    yield Rung(_cut_and_rounded(share), counts.bytes(four, stored, share=share), [cut, four_bits, packed])


def edge(counts: Counts, most: float, tokenizer: int) -> Iterator[Rung]:
    """Rungs of ONNX: layers in whole numbers, embedding and head in float32, each for itself."""
    if any(inputs % 32 for inputs in counts.inputs):
        return
    for bits, says in (
        (8, "8 bits, inputs rounded to 8 as well: products of whole numbers"),
        (4, "4 bits in groups of 32, inputs rounded to 8"),
    ):
        steps = [{"method": "gptq", "format": f"W{bits}A8 g32"}, _exported("onnx", "int8")]
        yield Rung(says, counts.bytes(bits + 0.5, 32, again=True) + tokenizer, steps)


def folder(counts: Counts, most: float, tokenizer: int) -> Iterator[Rung]:
    """The one rung of an ordinary folder, whose weights stay numbers of their own: fewer of them.

    Raises:
        Problem: If the model is as small as that already.
    """
    if counts.stored <= most:
        raise Problem(
            f"The model is of {counts.stored / 1e6:,.1f} MB already.",
            why=f"{most / 1e6:,.1f} MB were asked for.",
            fix="a smaller `--target`.",
        )
    inside = counts.stored * counts.coded / counts.weights
    share, cut = _cut(1 - (counts.stored - MARGIN * most) / inside)
    says = f"{share:.1%} of the weights inside the blocks stay, by search: less is stored, and less is multiplied"
    yield Rung(says, counts.stored - (1 - share) * inside, [cut])


RUNGS: dict[str, Callable[[Counts, float, int], Iterator[Rung]]] = {
    "cpu": folder, "gpu": folder, "llama.cpp": llama_cpp, "vllm": vllm, "edge": edge,
}  # fmt: skip


def turn(model: BlockModel, name: str, target: Target, place: str, text: tuple[str, ...] = ("boolq",)) -> Choice:
    """Chooses a recipe.

    Args:
        model: Opened from its folder.
        name: Of the recipe.
        target: What is asked for.
        place: What will run the model.
        text: On what it is measured.

    Raises:
        Problem: If the place is unknown, cannot run this model, or the target is out of reach; the nearest is said.
    """
    if place not in get_args(Place):
        raise Problem(f"`{place}` is no place to run.", why=f"they are {', '.join(get_args(Place))}.", fix="`--for llama.cpp`")
    assert model.checkpoint is not None
    if place == "llama.cpp":
        gguf_shapes(model)  # says what it cannot express
    timed = target.kind == "speed"
    measured = {"method": "evaluate", "text": list(text), "windows": 20, "latency": timed or place in ("cpu", "gpu")}
    if timed:
        return _faster(name, target, place, measured)
    counts = Counts.of(model)
    whole = counts.stored if place in ("cpu", "gpu") else counts.whole
    most = target.value * whole if target.value < 1 else target.value
    file = model.checkpoint.folder / "tokenizer.json"
    rungs = list(RUNGS[place](counts, most, file.stat().st_size if file.is_file() else 0))
    chosen = next((rung for rung in rungs if rung.bytes <= most), None)
    if chosen is None:
        least = min((rung.bytes for rung in rungs), default=whole)
        raise Problem(
            f"{target.text} is {most / 1e6:,.1f} MB, and the least for {place} is {least / 1e6:,.1f} MB.",
            why=_floor(place, counts), fix=f"`--target {_near(least)}`" + ("" if place == "llama.cpp" else ", or `--for llama.cpp`."),
            code=Exit.OUT_OF_BUDGET,
        )  # fmt: skip
    passed = [f"not enough: {rung.says} ({rung.bytes / 1e6:,.1f} MB)" for rung in rungs[: rungs.index(chosen)]]
    reasons = [
        f"{target.text} is {most / 1e6:,.1f} MB of {whole / 1e6:,.1f} MB",
        *passed,
        f"taken: {chosen.says} ({chosen.bytes / 1e6:,.1f} MB)",
    ]
    return Choice(_recipe(name, [*chosen.steps, measured]), reasons, target, most)


def _near(size: float) -> str:
    """A target that is reached by so many bytes."""
    return f"{math.ceil(size / 1e6 * 1.01)}MB" if size > 1e7 else f"{math.ceil(size / 1e3 * 1.01)}KB"


def _recipe(name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "calibration": CALIBRATION, "steps": steps}


def _floor(place: str, counts: Counts) -> str:
    """What stays whatever is done."""
    more = "" if place == "llama.cpp" else ", as they are stored"
    return f"at least {LEAST:.0%} of the blocks stay, and {counts.rest / 1e6:,.1f} million other weights do{more}."


def _faster(name: str, target: Target, place: str, measured: dict[str, Any]) -> Choice:
    """A recipe for speed, which only a run can tell."""
    if place not in ("cpu", "gpu"):
        raise Problem(
            f"A speed in {place} cannot be chosen before it is measured.", why="how much faster fewer bits are depends on its kernels, not on the model alone.",
            fix=f"a size, `--target 0.5x --for {place}`: the export's report has its measured speed; or `--for cpu`.",
        )  # fmt: skip
    step = {"method": "search", "target": {"latency": round(1 / target.value, 4)}}
    reasons = [
        f"a prefill is to take {1 / target.value:.1%} of the dense model's time on this machine",
        "fewer channels and heads are less work for any program; which ones leave is searched under the measured time of every block at every width",
    ]
    return Choice(_recipe(name, [step, measured]), reasons, target)


def judge(choice: Choice, results: dict[str, Any], out: Path) -> tuple[float, float]:
    """What was asked for and what was reached, bytes or a factor of speed.

    Args:
        choice: What ran.
        results: Of the run.
        out: Its folder.
    """
    if choice.target.kind == "speed":
        times = results["evaluations"][-1]["latency"]
        return choice.target.value, times["before"]["prefill_seconds"]["median"] / times["after"]["prefill_seconds"]["median"]
    assert choice.most is not None
    if results["exports"]:
        file = out / results["exports"][-1]["file"]
        parts = [file] if file.is_file() else [each for each in file.rglob("*") if each.is_file()]
    else:
        parts = list(out.glob("model*.safetensors"))
    return choice.most, float(sum(each.stat().st_size for each in parts))


def met(choice: Choice, asked: float, reached: float) -> bool:
    """Whether what was reached is what was asked for, within five percent."""
    return reached * NEAR >= asked if choice.target.kind == "speed" else reached <= asked * NEAR
