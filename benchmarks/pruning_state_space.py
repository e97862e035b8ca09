"""Claim: at 50 % and at 2:4 multi-weight pruning is nearer to a dense Mamba or Mamba-2 than magnitude, Wanda and SparseGPT.

    python benchmarks/train_state_space.py mamba out/mamba
    python benchmarks/train_state_space.py mamba2 out/mamba2
    python benchmarks/pruning_state_space.py out/mamba out/mamba2

Prunes in_proj, x_proj, dt_proj and out_proj of models trained by the first two lines (bytes of four embedded texts), from the same
calibration tokens; perplexity per byte and KL on a fifth text, which they were not trained on. Adds to
benchmarks/results/pruning_state_space.csv. About 10 minutes a model on 2 cores.
"""

from __future__ import annotations

from pathlib import Path

import rows
from duramen.evaluate.perplexity import perplexity
from pruning_quality import Bench, arguments

TARGETS = {"50%": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
SUBJECTS = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {"damping": 0.01}),
    **{f"multiweight {effort}": ("multiweight", {"effort": effort}) for effort in ("fast", "good", "best")},
}


def main() -> None:
    """Runs the table."""
    parser = arguments(TARGETS, SUBJECTS)
    parser.add_argument("models", nargs="+")
    parser.set_defaults(sequences=128, length=256, windows=16, window=512)
    options = parser.parse_args()
    for folder in options.models:
        options.model = folder
        bench = Bench.open(options)
        case = f"{Path(folder).name}, {bench.tokens.numel()} tokens, {options.text} {options.windows}x{options.window}"
        table = [row for row in rows.read("pruning_state_space") if not str(row["case"]).startswith(f"{Path(folder).name},")]
        name = Path(folder).name
        table.append(bench.row(f"{case}, {name} dense", "perplexity", "dense", perplexity(bench.reference.loss)))
        for label in options.targets:
            peer: dict[str, float] = {}
            for subject in options.subjects:
                method, settings = SUBJECTS[subject]
                found = bench.measure(method, TARGETS[label] | settings)
                del found["seconds"]
                if subject == "sparsegpt":
                    peer = {metric: figure.value for metric, figure in found.items()}
                for metric, figure in found.items():
                    against = ("sparsegpt", peer[metric]) if subject.startswith("multiweight") and peer else None
                    table.append(bench.row(f"{case}, {name} {label}", metric, subject, figure, against))
                rows.write("pruning_state_space", table)


if __name__ == "__main__":
    main()
