"""A network of whole numbers for other programs: ONNX for ONNX Runtime, QONNX for FPGA tools, and the codes themselves; each is opened again, and chosen matrices are run through the simulated engine.

Every matrix is compared with the product in whole numbers bit for bit, on what reaches it in a test image; the logits of a whole network may differ in their last digits, since norms and softmax are not the same code everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from duramen.hardware.fpga import Device, Engine, read_device
from duramen.hardware.packing import best_packing, packing_table
from duramen.hardware.simulation import Bench
from duramen.problem import Exit, Problem, need
from duramen.quantize.mixed_linear import MixedLinear
from duramen.quantize.rows import integer_product
from duramen.registry import Place, method
from duramen.registry import Settings as MethodSettings
from duramen.rundir import CODES, EXPORTS, write_json, write_tensors
from duramen.vision.cpu import session
from duramen.vision.elastic import ElasticViTForImageClassification
from duramen.vision.images import seen_by
from duramen.vision.integers import INPUT, OUTPUT, graph_of
from duramen.vision.studio import Studio

CHECKED = 16
"""Test images on which logits are compared."""
MOST_APART = 0.25
"""By how much of the largest logit they may differ: what is between matrices is rounded by other code, and a code of few bits that falls to the other side is a step away."""
Chosen = tuple[str, MixedLinear, float, Tensor | None]
"""The name of a matrix, itself, its share of rows of eight bits, and the factors of its layer."""
CODES_LAYOUT = "codes int8 [O, I], steps [O] with layer scales folded in, eight [O], bias [O], input_step []; output = steps * input_step * (codes @ input codes) + bias"


class Settings(MethodSettings):
    """Settings of exporting."""

    simulate: tuple[str, ...] = ()
    """Matrices that the engine multiplies in a simulation of its hardware, by name or glob, such as `layers.0.*`; their activations are those of a test image."""
    lanes: Annotated[int, Field(ge=2, multiple_of=2)] = 16
    """Of the simulated engine: rows of four bits at once. A large one takes long to compile."""
    inputs: Annotated[int, Field(ge=1)] = 16
    """Of the simulated engine: of each row at once."""
    device: Place = "zcu102"
    """Whose memory feeds it: a shipped device, or the path of a data file."""


def rehearse(studio: Studio, settings: Settings) -> None:
    """Stops where nothing could be exported, or no engine simulated."""
    chosen_of(checked(studio), settings)


def checked(studio: Studio) -> ElasticViTForImageClassification:
    """The model.

    Raises:
        Problem: If it does not round, or packages are missing.
    """
    network = studio.model
    if not isinstance(network, ElasticViTForImageClassification) or not network.config.rounding:
        raise Problem(
            "The model has no whole numbers to export.", why="it is none that a supernet was trained for.", fix="steps `supernet` and `vit_search` before.",
            code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    need("Opening again what was written", "onnx", "onnxruntime", "qonnx", install="onnx onnxruntime qonnx")
    return network


def chosen_of(network: ElasticViTForImageClassification, settings: Settings) -> list[Chosen]:
    """The matrices to simulate.

    Raises:
        Problem: If there are none of these names, no such device, or none whose multipliers hold their products.
    """
    chosen = [each for each in network.linears() if any(fnmatch(each[0], pattern) for pattern in settings.simulate)]
    if settings.simulate and not chosen:
        raise Problem(
            f"No matrix is called {', '.join(settings.simulate)}.",
            why=f"they are {', '.join(name for name, *_ in network.linears())}.",
            fix="one of these, or a glob such as `layers.0.*`.",
        )
    if chosen:
        engine_of(network.config.activation_bits, settings)
    return chosen


def engine_of(bits: int, settings: Settings) -> tuple[Engine, Device]:
    """What is simulated for activations of so many bits: four products of a multiplier where they fit, else two."""
    device = read_device(settings.device)
    factor: Literal[2, 4] = 4 if packing_table(4, bits, device.multiplier) else 2
    best_packing(factor, bits, device.multiplier)
    tokens = 2 if factor == 4 else 1
    return Engine(settings.lanes, settings.inputs, tokens, factor=factor, activation_bits=bits), device


@method(
    "export_images",
    title="Whole numbers for other programs",
    paper="",
    kind="images",
    settings=Settings,
    rehearse=rehearse,
)
@torch.no_grad()
def apply(studio: Studio, settings: Settings) -> list[dict[str, Any]]:
    """Writes the network into ``exports`` and proves what was written.

    Raises:
        Problem: If the model does not round, packages are missing, or anything differs.
    """
    network = deepcopy(checked(studio)).cpu()  # whole numbers are multiplied there alone
    chosen = chosen_of(network, settings)
    folder = studio.out / EXPORTS
    folder.mkdir(parents=True, exist_ok=True)
    pixels = seen_by(network, studio.test.pixels(range(min(CHECKED, len(studio.test.labels)))))
    _write_codes(network, folder)
    found = [_onnx(network, pixels, folder), qonnx_proof(network, pixels[:1], folder)]
    if chosen:
        found.append({"format": "simulated", "matrices": simulated(chosen, inputs_of(network, pixels[:1]), settings)})
    return found


def _write_codes(network: ElasticViTForImageClassification, folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name, matrix, share, scale in network.linears():
        mixed, step, bias = matrix.integers(share, scale)
        parts = {
            "codes": mixed.codes,
            "steps": mixed.steps,
            "eight": mixed.eight,
            "bias": bias,
            "input_step": torch.tensor(step),
        }
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
    write_tensors(folder / CODES, tensors, ("layout", CODES_LAYOUT))
    write_json(folder / "network.json", network.config.architecture.as_dict())


def _onnx(network: ElasticViTForImageClassification, pixels: Tensor, folder: Path) -> dict[str, Any]:
    """ONNX Runtime, by products of integers.

    Raises:
        Problem: If a matrix gives another bit.
    """
    from onnx.helper import make_empty_tensor_value_info

    model, taps = graph_of(network, "onnx")
    file = folder / "network.onnx"
    file.write_bytes(model.SerializeToString())
    (given,) = session(model).run([OUTPUT], {INPUT: pixels.numpy()})
    names = sorted({name for pair in taps.values() for name in pair})
    model.graph.output.extend(make_empty_tensor_value_info(name) for name in names)
    inside = dict(zip(names, session(model).run(names, {INPUT: pixels.numpy()}), strict=True))
    equal = _equal_matrices(network, taps, inside, "ONNX Runtime")
    said = {"format": "onnx", "file": f"{EXPORTS}/{file.name}", "bytes": file.stat().st_size, "equal_matrices": equal}
    return said | _compared(network(pixel_values=pixels).logits, given, file)


def _equal_matrices(
    network: ElasticViTForImageClassification,
    taps: dict[str, tuple[str, str]],
    inside: Mapping[str, np.ndarray[Any, Any]],
    runtime: str,
) -> int:
    """How many matrices give in a runtime, of what reached them there, what whole numbers give.

    Raises:
        Problem: If not all do.
    """
    for name, matrix, share, _ in network.linears():
        before, after = (torch.from_numpy(np.array(inside[tap])) for tap in taps[name])
        mixed, step, bias = matrix.integers(share)
        if not torch.equal(after, integer_product(mixed, codes_of(matrix, before), step, bias)):
            raise Problem(
                f"{name} gives other bits in {runtime} than in whole numbers.", why="a step or a row of it was written as another one.",
                fix="please report this with the recipe.", code=Exit.CHECK_FAILED,
            )  # fmt: skip
    return len(taps)


def qonnx_proof(network: ElasticViTForImageClassification, pixels: Tensor, folder: Path) -> dict[str, Any]:
    """Writes QONNX, runs it in its reference, and compares every matrix with whole numbers.

    Args:
        network: One that rounds.
        pixels: One image, normalised.
        folder: Where to write.

    Raises:
        Problem: If a matrix gives another bit.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    model, taps = graph_of(network, "qonnx", 1)
    file = folder / "network.qonnx"
    file.write_bytes(model.SerializeToString())
    inside = execute_onnx(
        ModelWrapper(model).transform(InferShapes()), {INPUT: pixels.cpu().numpy()}, return_full_exec_context=True
    )
    equal = _equal_matrices(network, taps, inside, "QONNX")
    said = {"format": "qonnx", "file": f"{EXPORTS}/{file.name}", "bytes": file.stat().st_size, "equal_matrices": equal}
    return said | _compared(network(pixel_values=pixels).logits, inside[OUTPUT], file)


def _compared(expected: Tensor, found: np.ndarray[Any, Any], file: Path) -> dict[str, float]:
    """How far logits are apart, and how large they are; a code of a norm's output that falls to the other side moves them a little.

    Raises:
        Problem: If they differ by more than a few such codes could.
    """
    given = torch.from_numpy(np.array(found))
    difference, largest = float((given - expected).abs().max()), float(expected.abs().max())
    if not difference <= MOST_APART * largest:
        raise Problem(
            f"{file.name} was opened again and its logits differ by {difference:.3g} (largest logit {largest:.3g}).",
            why="what lies between the matrices was written as something else.", fix="please report this with the recipe.",
            code=Exit.CHECK_FAILED,
        )  # fmt: skip
    return {
        "largest_difference": difference,
        "largest_logit": largest,
        "same_answers": float((given.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def codes_of(matrix: MixedLinear, x: Tensor) -> Tensor:
    """What a matrix rounds its inputs to."""
    codes: Tensor = matrix.inputs(x)[0]
    return codes.long()


@torch.no_grad()
def inputs_of(network: ElasticViTForImageClassification, pixels: Tensor) -> dict[str, Tensor]:
    """The codes that reach every matrix, [T, K]."""
    found: dict[str, Tensor] = {}
    hooks = [
        matrix.register_forward_pre_hook(
            lambda module, args, name=name: found.update({name: codes_of(module, args[0]).flatten(0, -2).cpu()})
        )
        for name, matrix, *_ in network.linears()
    ]
    network(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return found


def simulated(chosen: list[Chosen], inputs: dict[str, Tensor], settings: Settings) -> list[dict[str, Any]]:
    """Runs matrices through the simulated engine, with activations on the chip.

    Raises:
        Problem: If a sum is another one than in whole numbers.
    """
    engine, device = engine_of(chosen[0][1].inputs.grid.bits, settings)
    bits = engine.bits_per_cycle(device)
    shapes = [(*matrix.weight.shape, len(inputs[name])) for name, matrix, *_ in chosen]
    rows = []
    with Bench(engine, bits, tuple(map(max, zip(*shapes, strict=True)))) as bench:
        for (name, matrix, share, _), shape in zip(chosen, shapes, strict=True):
            mixed, *_ = matrix.integers(share)
            codes, eight, given = (each.cpu().numpy() for each in (mixed.codes.long(), mixed.eight, inputs[name].T))
            found = bench.run(codes, eight, given)
            apart = np.argwhere(found.sums != codes @ given)
            if len(apart):
                row, token = apart[0]
                raise Problem(
                    f"The simulated engine gives another sum in {name}, row {row}, token {token}: {found.sums[row, token]}.",
                    why=f"in whole numbers it is {(codes @ given)[row, token]}.",
                    fix="please report this with the recipe.",
                    code=Exit.CHECK_FAILED,
                )
            rows.append(
                {"name": name, "shape": list(shape), "bits": mixed.bits, "cycles": found.cycles, "modelled": found.modelled, "products": prod(shape)}
            )  # fmt: skip
    return rows
