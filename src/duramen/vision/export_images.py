"""A network of whole numbers for other programs: ONNX for ONNX Runtime, QONNX for FPGA tools, and the codes themselves; each is opened again, and chosen matrices are run through the simulated engine.

Every matrix is compared with the product in whole numbers bit for bit, on what reaches it in a test image; the logits of a whole network may differ in their last digits, since norms and softmax are not the same code everywhere.
"""

from __future__ import annotations

from copy import deepcopy
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from duramen.hardware.fpga import Engine, read_device
from duramen.hardware.simulation import Bench
from duramen.problem import Exit, Problem, need
from duramen.quantize.mixed_linear import MixedLinear
from duramen.quantize.rows import integer_product
from duramen.registry import Place, method
from duramen.registry import Settings as MethodSettings
from duramen.rundir import CODES, write_json, write_tensors
from duramen.vision.cpu import session
from duramen.vision.elastic import ElasticViTForImageClassification
from duramen.vision.images import seen_by
from duramen.vision.integers import INPUT, OUTPUT, graph_of
from duramen.vision.studio import Studio

CHECKED = 16
"""Test images on which logits are compared."""
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


@method("export_images", title="Whole numbers for other programs", paper="", kind="images", settings=Settings)
@torch.no_grad()
def apply(studio: Studio, settings: Settings) -> list[dict[str, Any]]:
    """Writes the network into ``exports`` and proves what was written.

    Raises:
        Problem: If the model does not round, packages are missing, or anything differs.
    """
    network = studio.model
    if not isinstance(network, ElasticViTForImageClassification) or not network.config.rounding:
        raise Problem(
            "The model has no whole numbers to export.", why="it is none that a supernet was trained for.", fix="steps `supernet` and `vit_search` before.",
            code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    need("Opening again what was written", "onnx", "onnxruntime", "qonnx", install="onnx onnxruntime qonnx")
    network = deepcopy(network).cpu()  # whole numbers are multiplied there alone
    chosen = [each for each in network.linears() if any(fnmatch(each[0], pattern) for pattern in settings.simulate)]
    if settings.simulate and not chosen:
        raise Problem(
            f"No matrix is called {', '.join(settings.simulate)}.",
            why=f"they are {', '.join(name for name, *_ in network.linears())}.",
            fix="one of these, or a glob such as `layers.0.*`.",
        )
    folder = studio.out / "exports"
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
    """ONNX Runtime, by products of integers."""
    model, _ = graph_of(network, "onnx")
    file = folder / "network.onnx"
    file.write_bytes(model.SerializeToString())
    said = network(pixel_values=pixels).logits
    given = session(model).run([OUTPUT], {INPUT: pixels.cpu().numpy()})[0]
    return {"format": "onnx", "file": f"exports/{file.name}", "bytes": file.stat().st_size} | _compared(
        said, torch.from_numpy(given)
    )


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
    for name, matrix, share, _ in network.linears():
        before, after = (torch.from_numpy(np.array(inside[tap])) for tap in taps[name])
        mixed, step, bias = matrix.integers(share)
        if not torch.equal(after, integer_product(mixed, codes_of(matrix, before), step, bias)):
            raise Problem(
                f"{name} gives other bits in QONNX than in whole numbers.", why="a step or a row of it was written as another one.",
                fix="please report this with the recipe.", code=Exit.CHECK_FAILED,
            )  # fmt: skip
    compared = _compared(network(pixel_values=pixels).logits, torch.from_numpy(np.array(inside[OUTPUT])))
    return {
        "format": "qonnx",
        "file": f"exports/{file.name}",
        "bytes": file.stat().st_size,
        "equal_matrices": len(taps),
    } | compared


def _compared(expected: Tensor, found: Tensor) -> dict[str, float]:
    """How far logits are apart, and how large they are."""
    return {
        "largest_difference": float((found - expected.cpu()).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "same_answers": float((found.argmax(-1) == expected.cpu().argmax(-1)).float().mean()),
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


def simulated(
    chosen: list[tuple[str, MixedLinear, float, Tensor | None]], inputs: dict[str, Tensor], settings: Settings
) -> list[dict[str, Any]]:
    """Runs matrices through the simulated engine, with activations on the chip.

    Raises:
        Problem: If a sum is another one than in whole numbers.
    """
    engine = Engine(lanes=settings.lanes, inputs=settings.inputs, activation_bits=chosen[0][1].inputs.grid.bits)
    bits = engine.bits_per_cycle(read_device(settings.device))
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
