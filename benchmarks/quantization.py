"""Claim: refined rounding is nearer to the dense model than GPTQ, on every grid.

    python benchmarks/quantization.py --text wiki.test.raw

Rounds a model's weights by every method to every grid from the same calibration tokens. GPTQ as published takes the steps of the largest weights; the other subjects take weighted ones. SmolLM2-135M's own weights lie
on a grid of four bits in groups of 32, so that no such grid says anything. Measures and writes as pruning_frontier.py, to benchmarks/results/quantization.csv; about two hours on 2 cores.
"""

from __future__ import annotations

from pruning_frontier import fill

TARGETS = {grid: {"format": grid} for grid in ("W4 row", "W4 g64", "W3 g64", "W2 g64")}
SUBJECTS = {
    "rtn, absmax": ("rtn", {"step": "absmax"}),
    "rtn": ("rtn", {}),
    "gptq as published": ("gptq", {"step": "absmax", "refine": 0}),
    "gptq, not refined": ("gptq", {"refine": 0}),
    "gptq": ("gptq", {}),
    "gptq, damping held-out": ("gptq", {"damping": "held-out"}),
    "gptq, a quarter of the target dense": ("gptq", {"dense_target": 0.25}),
}


def main() -> None:
    """Runs the table."""
    fill("quantization", TARGETS, SUBJECTS, peer="gptq as published")


if __name__ == "__main__":
    main()
