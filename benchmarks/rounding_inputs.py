"""Claim: rotation takes two thirds of the damage out of rounding inputs by token, smoothing where it does not reach a fifth to a half of the rest; by groups of 32 smoothing alone does more at four bits.

    python benchmarks/rounding_inputs.py --text wiki.test.raw

Rounds nothing but inputs, or keys and values, of a model as it is, smoothed, rotated, and both where rotation does not reach. Measures perplexity and KL from the dense model. Adds to
benchmarks/results/rounding_inputs.csv after every run; runs that stand there are left out. About 20 minutes on 2 cores.
"""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import AutoModelForCausalLM

import rows
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity
from duramen.families.model import BlockModel
from duramen.grids import parse_format
from duramen.hardware.machine import fastest_device
from duramen.intervals import mean_interval
from duramen.quantize.model import formats_of
from duramen.registry import get_method
from duramen.rounding import start_rounding
from pruning_quality import Bench, arguments

FORMATS = ("A8", "A6", "A4", "A4g64", "A4g32", "KV8", "KV4", "KV4 sinks4", "KV3", "KV3 sinks4")
SUBJECTS = {
    "as it is": (),
    "smoothed": (("smooth", {}),),
    "rotated": (("rotate", {}),),
    "rotated, inputs of o and down smoothed": (("rotate", {}), ("smooth", {"only": ("o", "down")})),
}


def main() -> None:
    """Runs the table."""
    options = arguments(FORMATS, SUBJECTS).parse_args()
    table, bench = rows.read("rounding_inputs"), Bench.open(options)
    case = f"{options.model}, {Path(options.text).name} {options.windows}x{options.window}"
    if not any(row["case"] == f"{case}, dense" for row in table):
        table.append(bench.row(f"{case}, dense", "perplexity", "dense", perplexity(bench.reference.loss)))
    plain = AutoModelForCausalLM.from_pretrained(bench.folder, dtype="float32").to(fastest_device())
    networks = {subject: copy.deepcopy(plain) for subject in options.subjects}
    for subject, network in networks.items():
        for method, settings in SUBJECTS[subject]:
            get_method(method).apply(network, bench.tokens, **settings)
    for label in options.targets:
        here = f"{case}, {label}"
        for subject in options.subjects:
            if any((row["case"], row["subject"]) == (here, subject) for row in table):
                continue
            model = BlockModel.from_module(copy.deepcopy(networks[subject]))
            start_rounding(model.network, formats_of(model, list(model.layer_names()), parse_format(label)))
            found = divergence(bench.dense, bench.hidden, model, final_hidden(model, bench.windows), bench.windows)
            figures = {"perplexity": perplexity(found.loss), "KL from dense": mean_interval(found.kl)}
            print(label, subject, {name: round(figure.value, 4) for name, figure in figures.items()}, flush=True)
            for metric, figure in figures.items():
                table.append(bench.row(here, metric, subject, figure, rows.peer_of(table, here, metric, "as it is")))
            rows.write("rounding_inputs", table)


if __name__ == "__main__":
    main()
