"""Claim: no file makes Duramen crash, hang or run code, and every recipe that is taken ends in a folder that opens, or in a refusal that says why.

    python benchmarks/robustness.py fuzz --inputs 1000
    python benchmarks/robustness.py soak --recipes 50

``fuzz`` gives every reader of files that many malformed ones. ``soak`` draws recipes of one to three steps with settings of their own for tiny models of every family, runs them, opens what they leave, and
generates with it; a run that failed is started again, and must end as before with all that was finished. Writes benchmarks/results/robustness.csv. About twenty minutes each on 1 thread.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
LONGEST = 300
"""Seconds after which a thing counts as hanging."""


class Hang(BaseException):
    """It took too long."""


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("which", choices=["fuzz", "soak"])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--recipes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _hang)
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as cache:
        os.environ["DURAMEN_CACHE"] = cache  # apart, since whatever appears in ``place`` counts as a fault
        table = [row for row in rows.read("robustness") if not str(row["case"]).startswith(options.which)]
        if options.which == "fuzz":
            table += fuzz(Path(place), options.inputs, options.seed)
        else:
            table += soak(Path(place), options.recipes, options.seed)
    rows.write("robustness", table)


def _hang(*_: Any) -> None:
    raise Hang


def fuzz(place: Path, inputs: int, seed: int) -> list[dict[str, object]]:
    """Malformed files for every reader."""
    from malformed import Readers

    (place / "inside").mkdir()
    readers, found = Readers(place / "inside"), Counter[str]()
    for name in readers.all:
        before = found.copy()
        for number in range(inputs):
            signal.alarm(LONGEST)
            try:
                found[readers.read(name, random.Random(f"{seed} {name} {number}"))] += 1
            except (Exception, Hang):
                found["crashed"] += 1
                print(name, number, traceback.format_exc(limit=-3), flush=True)
            finally:
                signal.alarm(0)
        print(name, dict(found - before), flush=True)
    case = f"fuzz, {len(readers.all)} readers"
    return [
        rows.row(case, f"files {fate}", "1", "duramen", found[fate], samples=found.total())
        for fate in ("read", "refused", "crashed")
    ]


def soak(place: Path, recipes: int, seed: int) -> list[dict[str, object]]:
    """Recipes that are drawn, on all families."""
    from soaking import carried_out, draw_recipe, prepared

    folders, text = prepared(place)
    found = Counter[str]()
    for number in range(recipes):
        draw = random.Random(f"{seed} {number}")
        family = list(folders)[number % len(folders)]
        recipe = draw_recipe(draw, family, text)
        signal.alarm(LONGEST)
        try:
            fate = carried_out(recipe, folders[family], place / "out")
        except (Exception, Hang):
            fate = "crashed"
            print(number, family, recipe["steps"], traceback.format_exc(limit=-4), flush=True)
        finally:
            signal.alarm(0)
        found[fate] += 1
        print(number, family, [step["method"] for step in recipe["steps"]], fate, flush=True)
        shutil.rmtree(place / "out", ignore_errors=True)
    return [
        rows.row(f"soak, {len(folders)} families", f"recipes {fate}", "1", "duramen", found[fate], samples=recipes)
        for fate in ("opened again", "refused", "crashed", "lost")
    ]


if __name__ == "__main__":
    main()
