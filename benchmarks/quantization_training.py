"""Claim: sixty short steps of training while it rounds take back four ninths of what rounding weights and inputs to four bits costs; without the loss of maps it is not measured yet.

    python benchmarks/quantization_training.py --text wiki.test.raw

Rotates SmolLM2-135M and rounds it by GPTQ, with and without the rotation; then trains the rotated one on, towards the dense model, with and without the loss of attention maps, on equal tokens. Measures
perplexity, KL from the dense model and processor seconds. Adds to benchmarks/results/quantization_training.csv after every run; runs that stand there are left out. About two hours on 2 cores.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import duramen
import rows
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity
from duramen.intervals import mean_interval
from duramen.opening import open_blocks
from pruning_quality import CORPORA, Bench, arguments, exactly

FORMATS = ("W4A4 g64",)
TRAINING = {"method": "qat", "steps": 60, "batch": 8, "every": 20, "parent": "smollm2-135m"}
SUBJECTS = {
    "gptq": None,
    "rotated, gptq": None,
    "rotated, gptq, qat": {},
    "rotated, gptq, qat without maps": {"map_loss": "off"},
}


def main() -> None:
    """Runs the table."""
    parser = arguments(FORMATS, SUBJECTS)
    parser.add_argument("--work", default=tempfile.mkdtemp())
    options = parser.parse_args()
    table, bench = rows.read("quantization_training"), Bench.open(options)
    for label in options.targets:
        case = f"{options.model}, {Path(options.text).name} {options.windows}x{options.window}, {label}"
        for subject in options.subjects:
            if any((row["case"], row["subject"]) == (case, subject) for row in table):
                continue
            begun = time.process_time()
            folder = made(Path(options.work), label, subject)
            seconds = time.process_time() - begun
            model = open_blocks(folder)
            found = divergence(bench.dense, bench.hidden, model, final_hidden(model, bench.windows), bench.windows)
            figures = {
                "perplexity": perplexity(found.loss),
                "KL from dense": mean_interval(found.kl),
                "processor seconds": exactly(seconds),
            }
            print(label, subject, {name: round(figure.value, 4) for name, figure in figures.items()}, flush=True)
            for metric, figure in figures.items():
                against = rows.peer_of(table, case, metric, "gptq") if metric != "processor seconds" else None
                table.append(bench.row(case, metric, subject, figure, against))
            table += [
                bench.row(f"{case}, {done} steps", "held-out loss", subject, exactly(loss)) for done, loss in held_out(folder)
            ]
            rows.write("quantization_training", table)


def held_out(folder: Path) -> list[tuple[int, float]]:
    """(steps done, held-out loss) of the training that made a folder; none where nothing was trained."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return [tuple(each) for step in results["steps"] if step.get("training") for each in step["training"]["held_out"]]


def made(work: Path, label: str, subject: str) -> Path:
    """The folder of a subject; what it begins with is made once."""
    rounded = work / ("rotated" if subject.startswith("rotated") else "plain")
    steps = [{"method": "rotate"}] * subject.startswith("rotated") + [{"method": "gptq", "format": label}]
    calibration = {"text": list(CORPORA), "sequences": 32, "length": 512}
    duramen.run({"name": "rounded", "dtype": "float32", "calibration": calibration, "steps": steps}, "smollm2-135m", rounded)
    if SUBJECTS[subject] is None:
        return rounded
    out = work / subject.replace(" ", "-").replace(",", "")
    calibration = {"text": list(CORPORA), "sequences": 512, "length": 128}
    steps = [TRAINING | SUBJECTS[subject]]
    duramen.run({"name": "trained", "dtype": "float32", "calibration": calibration, "steps": steps}, str(rounded), out)
    return out


if __name__ == "__main__":
    main()
