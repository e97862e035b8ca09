"""Claim: a training that is killed at random moments in every stage ends with the same bytes as one that is left alone.

    python benchmarks/training_resume.py --seeds 1 2

Runs the miniature `train-ci` once, and again for every seed with kill -9 after random times, until it is done; counts kills and stages whose outputs differ. Writes
benchmarks/results/training_resume.csv. About eight minutes a seed on 1 thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import rows

SHORTEST, LONGEST = 8.0, 30.0
"""Seconds that a run is left alone before it is killed."""


def main() -> None:
    """Runs all seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    options = parser.parse_args()
    table = rows.read("training_resume")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        train(whole, None)
        for seed in options.seeds:
            killed = Path(folder) / f"killed-{seed}"
            draw, kills = random.Random(seed), 0
            while not train(killed, draw.uniform(SHORTEST, LONGEST)):
                kills += 1
            stages = outputs(whole)
            different = [name for name, hashes in outputs(killed).items() if hashes != stages[name]]
            print(f"seed {seed}: {kills} kills, different: {different or 'none'}", flush=True)
            case = f"train-ci, {len(stages)} stages, seed {seed}"
            table.append(rows.row(case, "kills", "1", "duramen train", kills, samples=1))
            table.append(rows.row(case, "stages that differ", "1", "duramen train", len(different), samples=len(stages)))
            rows.write("training_resume", table)


def train(out: Path, seconds: float | None) -> bool:
    """One run, killed after so many seconds; whether it was done before."""
    with (out.parent / "errors").open("w") as errors:
        line = [sys.executable, "-m", "duramen", "train", "train-ci", str(out)]
        worker = subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=errors, stdout=subprocess.DEVNULL)
        try:
            if worker.wait(seconds):
                raise SystemExit((out.parent / "errors").read_text())
        except subprocess.TimeoutExpired:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            return False
    return True


def outputs(out: Path) -> dict[str, dict[str, str]]:
    """Hashes of what every stage left."""
    return {file.parent.name: json.loads(file.read_text())["outputs"] for file in sorted(out.glob("stages/*/manifest.json"))}


if __name__ == "__main__":
    main()
