"""Question: which share of the dense model's output as target, and which allocation, leave a pruned model nearest to the dense one?

    python benchmarks/pruning_settings.py --text wiki.test.raw

Prunes a model by multi-weight pruning at the default effort, with a quarter of the dense target and the same share everywhere, or one of
the two changed. Adds to
benchmarks/results/pruning_settings.csv after every run; runs that stand there are left out. About two hours on 2 cores.
"""

from __future__ import annotations

from pruning_frontier import TARGETS, fill

UNIFORM = "dense_target: 0.25"
SUBJECTS = {
    **{f"dense_target: {alpha}": ("multiweight", {"dense_target": alpha}) for alpha in (0.25, 0.0, 0.5, 1.0)},
    **{
        f"{UNIFORM}, allocation: {allocation}": ("multiweight", {"dense_target": 0.25, "allocation": allocation})
        for allocation in ("owl", "curve")
    },
}


def main() -> None:
    """Runs the table."""
    targets = {label: TARGETS[label] for label in ("50%", "60%", "70%", "2:4")}
    fill("pruning_settings", targets, SUBJECTS, peer=UNIFORM)


if __name__ == "__main__":
    main()
