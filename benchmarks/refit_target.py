"""Claim: a quarter of the dense model's output is the best target of the refit; all of it harms other text than that of the calibration.

    python benchmarks/refit_target.py --text wiki.test.raw

Prunes by Wanda, refits with several settings of ``dense_target`` from the same calibration tokens, and measures perplexity and KL from dense, in
float32. Adds to benchmarks/results/refit_target.csv after every run; runs that stand there are left out. About an hour on one core.
"""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import AutoModelForCausalLM

import rows
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity
from duramen.families.model import BlockModel
from duramen.hardware.machine import fastest_device
from duramen.intervals import mean_interval
from duramen.registry import get_method
from pruning_quality import Bench, arguments

TARGETS = {"50%": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
SUBJECTS = {"wanda": None, **{f"refit, dense_target {alpha:g}": alpha for alpha in (0.0, 0.25, 0.5, 1.0)}}


def main() -> None:
    """Runs the table."""
    parser = arguments(TARGETS, SUBJECTS)
    parser.set_defaults(window=1024)
    options = parser.parse_args()
    table, bench = rows.read("refit_target"), Bench.open(options)
    dense, pruned = (AutoModelForCausalLM.from_pretrained(bench.folder, dtype="float32").to(fastest_device()) for _ in range(2))
    weights = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for label in options.targets:
        case = f"{options.model}, {bench.tokens.numel()} tokens, {Path(options.text).name} {options.windows}x{options.window}, {label}"
        pruned.load_state_dict(weights)
        get_method("wanda").apply(pruned, bench.tokens, **TARGETS[label])
        for subject in options.subjects:
            if any((row["case"], row["subject"]) == (case, subject) for row in table):
                continue
            network, alpha = pruned, SUBJECTS[subject]
            if alpha is not None:
                network = copy.deepcopy(pruned)
                get_method("refit").apply(network, bench.tokens, dense=dense, dense_target=alpha)
            edited = BlockModel.from_module(network)
            found = divergence(bench.dense, bench.hidden, edited, final_hidden(edited, bench.windows), bench.windows)
            figures = {"perplexity": perplexity(found.loss), "KL from dense": mean_interval(found.kl)}
            table += [bench.row(case, metric, subject, figure) for metric, figure in figures.items()]
            rows.write("refit_target", table)
            print(label, subject, {name: round(figure.value, 4) for name, figure in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
