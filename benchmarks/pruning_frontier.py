"""Claim: searched masks, solved exactly, are nearer to the dense model than every one-shot method, at every sparsity.

    python benchmarks/pruning_frontier.py --text wiki.test.raw
    python benchmarks/pruning_frontier.py --text wiki.test.raw --model gemma3-270m

Prunes a model by every method at every target from the same calibration tokens, each with its published damping (0.01) or, for
the three efforts of multi-weight pruning, the default that is chosen on held-out sequences. ALPS-style is ADMM's mask at the
published damping, fitted to the dense layer as ALPS does, and solved exactly where ALPS takes ten iterations. Measures the summed relative layer error, perplexity, KL from dense, and the
processor seconds of pruning, which other work on the machine hardly changes. Adds to benchmarks/results/pruning_frontier.csv after every run; runs that stand there are left out. About two hours a
model on 2 cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import rows
from duramen.evaluate.perplexity import perplexity
from duramen.intervals import Measured
from duramen.problem import Problem
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

Outside = Callable[[Bench, str, str], tuple[dict[str, Measured], str]]
"""Measures a peer by another Python at one target: the figures, and the versions used."""


def main() -> None:
    """Runs the table."""
    fill("pruning_frontier", TARGETS, SUBJECTS, peer="sparsegpt")


def fill(
    name: str,
    targets: Mapping[str, Mapping[str, object]],
    subjects: Mapping[str, tuple[str, Mapping[str, object]]],
    *,
    peer: str,
    outside: Mapping[str, Outside] | None = None,
) -> None:
    """Measures every subject at every target, leaving out what stands in the results file; the peer comes before those compared with it.

    Subjects from ``outside`` run by ``--peer-python``, and are left out without it.
    """
    parser, outside = arguments(targets, subjects), outside or {}
    if outside:
        parser.add_argument("--peer-python", default="", help="python of an environment that has the peers")
    options = parser.parse_args()
    table = rows.read(name)
    bench = Bench.open(options)
    case = f"{options.model}, {bench.tokens.numel()} tokens, {Path(options.text).name} {options.windows}x{options.window}"
    if not any(row["case"] == f"{case}, dense" for row in table):
        table.append(bench.row(f"{case}, dense", "perplexity", "dense", perplexity(bench.reference.loss)))
    for label in options.targets:
        here = f"{case}, {label}"
        for subject in [*options.subjects, *(outside if outside and options.peer_python else ())]:
            if any((row["case"], row["subject"]) == (here, subject) for row in table):
                continue
            peers = {
                row["metric"]: (peer, float(row["value"]))
                for row in table
                if (row["case"], row["subject"]) == (here, peer) and subject != peer
            }
            used = ""
            try:
                if subject in outside:
                    figures, used = outside[subject](bench, options.peer_python, label)
                else:
                    method, settings = subjects[subject]
                    figures = bench.measure(method, {**targets[label], **settings})
            except Problem as problem:  # such as an allocation of N:M
                print(label, subject, problem, flush=True)
                continue
            for metric, figure in figures.items():
                table.append(bench.row(here, metric, subject, figure, peers.get(metric), used))
            rows.write(name, table)


if __name__ == "__main__":
    main()
