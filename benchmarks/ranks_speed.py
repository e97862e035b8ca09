"""Claim: two processes under torchrun prune as one does, in less time per calibration token, where each has a core of its own.

    python benchmarks/ranks_speed.py

Prunes six blocks of SmolLM2-135M from 32,768 tokens with one process of one thread, two of one thread each, and one of two threads,
and compares masks and weights with those of the first. Writes benchmarks/results/ranks_speed.csv. About 10 minutes on 2 cores;
leave the machine idle.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rows
from duramen.assets import open_model
from duramen.calibrate import ranks
from duramen.calibrate.tokens import calibration_tokens
from duramen.registry import get_method

CORPORA = ("squad", "coqa", "drop", "sciriff")
METHODS = {"wanda": ("wanda", {}), "multiweight good": ("multiweight", {"damping": 0.01})}
SUBJECTS = {"1 process, 1 thread": (1, 1), "2 processes, 1 thread each": (2, 1), "1 process, 2 threads": (1, 2)}
"""Processes and threads of each."""
TOKENS = (64, 512)


def prune(method: str, out: str) -> None:
    """Worker: prunes; the first rank writes the weights and the seconds."""
    folder = open_model("smollm2-135m")
    name, settings = METHODS[method]
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(folder), CORPORA, sequences=TOKENS[0], length=TOKENS[1], seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with ranks.joined():
        ranks.wait()
        start = time.perf_counter()
        records = get_method(name).apply(model, tokens, sparsity=0.5, only=("blocks:0-5",), **settings)
        seconds = time.perf_counter() - start
        if ranks.leads():
            layers = {record["layer"]: model.get_submodule(record["layer"]).weight.contiguous() for record in records}
            save_file(layers | {"seconds": torch.tensor(seconds)}, out)


def main() -> None:
    """Runs the table."""
    table = []
    for method in METHODS:
        first, alone = {}, 0.0
        for subject, (processes, threads) in SUBJECTS.items():
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "found.safetensors"
                launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
                line = [sys.executable, *launch, __file__, "--worker", method, str(out)]
                subprocess.run(line, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
                found = load_file(out)
            time_per_token = 1e6 * float(found.pop("seconds")) / (TOKENS[0] * TOKENS[1])
            peer = {"peer": next(iter(SUBJECTS)), "peer_value": alone} if first else {}
            if not first:
                first, alone = found, time_per_token
            kept = sum(float(((tensor == 0) == (first[name] == 0)).sum()) for name, tensor in found.items())
            same = kept / sum(tensor.numel() for tensor in found.values())
            apart = sum(float((tensor - first[name]).square().sum()) for name, tensor in found.items())
            norm = sum(float(first[name].square().sum()) for name in found)
            case = f"SmolLM2-135M, blocks 0-5, {TOKENS[0] * TOKENS[1]} tokens, {method}"
            figures = (
                ("time per calibration token", "µs", time_per_token, peer),
                ("share of equal mask entries", "1", same, {}),
                ("relative difference of the weights", "1", (apart / norm) ** 0.5, {}),
            )
            table += [rows.row(case, metric, unit, subject, value, samples=1, **more) for metric, unit, value, more in figures]
            rows.write("ranks_speed", table)
            print(method, subject, [figure[2] for figure in figures], flush=True)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        prune(*sys.argv[2:])
    else:
        main()
