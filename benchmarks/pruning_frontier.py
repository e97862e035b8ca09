"""Claim: searched masks, solved exactly, are nearer to the dense model than every one-shot method, at every sparsity.

    python benchmarks/pruning_frontier.py --text wiki.test.raw
    python benchmarks/pruning_frontier.py --text wiki.test.raw --model gemma3-270m

Prunes a model by every method at every target from the same calibration tokens, each with its published damping (0.01) or, for
the three efforts of multi-weight pruning, the default that is chosen on held-out sequences. ALPS-style is ADMM's mask at the
published damping, fitted to the dense layer as ALPS does, and solved exactly where ALPS takes ten iterations. Measures the summed relative layer error, perplexity, KL from dense, and the seconds
of pruning. Adds to benchmarks/results/pruning_frontier.csv after every run; runs that stand there are left out. About two hours a
model on 2 cores.
"""

from __future__ import annotations

from pathlib import Path

import rows
from duramen.evaluate.perplexity import perplexity
from pruning_quality import Bench, arguments

TARGETS = {
    **{f"{share}%": {"sparsity": share / 100} for share in (50, 60, 70, 80)},
    **{pattern: {"pattern": pattern} for pattern in ("2:4", "4:8")},
}
SUBJECTS = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {"damping": 0.01}),
    "ALPS-style": ("multiweight", {"mask": "admm", "damping": 0.01, "dense_target": 0.0}),
    **{f"multiweight {effort}": ("multiweight", {"effort": effort}) for effort in ("fast", "good", "best")},
}


def main() -> None:
    """Runs the table."""
    options = arguments(TARGETS, SUBJECTS).parse_args()
    table = rows.read("pruning_frontier")
    bench = Bench.open(options)
    case = f"{options.model}, {bench.tokens.numel()} tokens, {Path(options.text).name} {options.windows}x{options.window}"
    if not any(row["case"] == f"{case}, dense" for row in table):
        table.append(bench.row(f"{case}, dense", "perplexity", "dense", perplexity(bench.reference.loss)))
    for label in options.targets:
        for subject in options.subjects:
            if any((row["case"], row["subject"]) == (f"{case}, {label}", subject) for row in table):
                continue
            method, settings = SUBJECTS[subject]
            for metric, figure in bench.measure(method, TARGETS[label] | settings).items():
                found = [
                    row
                    for row in table
                    if (row["case"], row["metric"], row["subject"]) == (f"{case}, {label}", metric, "sparsegpt")
                ]
                peer = ("sparsegpt", float(found[0]["value"])) if found and subject != "sparsegpt" else None
                table.append(bench.row(f"{case}, {label}", metric, subject, figure, peer))
            rows.write("pruning_frontier", table)


if __name__ == "__main__":
    main()
