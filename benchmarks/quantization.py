"""Claim: refined rounding is nearer to the dense model than GPTQ, on every grid.

    python benchmarks/quantization.py --text wiki.test.raw
    python -m venv PEER && PEER/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 torchao==0.18.0 nncf==3.4.0
    python benchmarks/quantization.py --text wiki.test.raw --peer-python PEER/bin/python     # with llm-compressor's GPTQ, torchao's HQQ and NNCF

Rounds a model's weights by every method to every grid from the same calibration tokens. GPTQ as published takes the steps of the largest weights; the other subjects take weighted ones. SmolLM2-135M's own weights lie
on a grid of four bits in groups of 32, so that no such grid says anything. Measures and writes as pruning_frontier.py, to benchmarks/results/quantization.csv; about two hours on 2 cores.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import AutoModelForCausalLM

from duramen.grids import Format, parse_format
from duramen.hardware.machine import fastest_device
from duramen.intervals import Measured
from duramen.problem import Problem
from duramen.registry import get_method
from peers import ask
from pruning_frontier import fill
from pruning_quality import Bench, exactly

TARGETS = {
    grid: {"format": grid}
    for grid in (
        "W4 row",
        "W4 g64",
        "W3 g64",
        "W2 g64",
        "W3 g64 affine",
        "W2 g64 affine",
        "W8A8 row",
        "W4A8 g64",
        "W4A4 g64",
        "W4A8KV8 g64",
        "W4A4KV4 g64",
    )
}
SUBJECTS = {
    "rtn, absmax": ("rtn", {"step": "absmax"}),
    "rtn": ("rtn", {}),
    "gptq as published": ("gptq", {"step": "absmax", "refine": 0}),
    "gptq, not refined": ("gptq", {"refine": 0}),
    "gptq": ("gptq", {}),
    "gptq, damping held-out": ("gptq", {"damping": "held-out"}),
    "gptq, a quarter of the target dense": ("gptq", {"dense_target": 0.25}),
}


def elsewhere(bench: Bench, python: str, label: str, *worker: str) -> tuple[dict[str, Measured], str]:
    """A worker rounds the weights; inputs, keys and values are rounded by ours, as for all subjects."""
    form = parse_format(label)
    found, tensors = ask(python, worker[0], bench.folder, bench.tokens, *worker[1:], Format(weights=form.weights).text)
    network = AutoModelForCausalLM.from_pretrained(bench.folder, dtype="float32")
    assert not network.load_state_dict(tensors, strict=False).unexpected_keys
    rest = replace(form, weights=None)
    if rest.runs:
        get_method("rtn").apply(network, bench.tokens, format=rest.text)
    used = " ".join(f"peer:{name}={version}" for name, version in found["versions"].items())
    return bench.judge(network.to(fastest_device())) | {"processor seconds": exactly(found["processor_seconds"])}, used


def by_llmcompressor(bench: Bench, python: str, label: str) -> tuple[dict[str, Measured], str]:
    """Its GPTQ."""
    return elsewhere(bench, python, label, "peer_llmcompressor.py", "gptq", "0.01")


def by_torchao(bench: Bench, python: str, label: str) -> tuple[dict[str, Measured], str]:
    """Its half-quadratic quantization, which needs no calibration."""
    grid = parse_format(label).weights
    if not (grid and grid.affine and isinstance(grid.share, int)):
        raise Problem(f"torchao's HQQ does not round to {label}.", why="its grids are affine, by groups.", fix="an affine one.")
    return elsewhere(bench, python, label, "peer_torchao.py")


def by_nncf(bench: Bench, python: str, label: str) -> tuple[dict[str, Measured], str]:
    """Its weight compression."""
    grid = parse_format(label).weights
    if not grid or grid.affine or grid.bits < 4:
        raise Problem(
            f"NNCF does not round torch models to {label}.", why="it has four bits and eight.", fix="a symmetric grid of one."
        )
    return elsewhere(bench, python, label, "peer_nncf.py")


OUTSIDE = {"llmcompressor gptq": by_llmcompressor, "torchao hqq": by_torchao, "nncf": by_nncf}


def main() -> None:
    """Runs the table."""
    fill("quantization", TARGETS, SUBJECTS, peer="gptq as published", outside=OUTSIDE)


if __name__ == "__main__":
    main()
