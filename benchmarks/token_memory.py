"""Claim: a prompt takes less memory on the exact scans than on those of transformers, and less yet where tokens leave.

    OMP_NUM_THREADS=1 python benchmarks/token_memory.py

Reads one prompt with random weights in a process of its own, by the models and ways of token_speed.py, with logits of the last token alone, and takes the most memory that the
process held above what it held before. Writes benchmarks/results/token_memory.csv; about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import AutoModelForCausalLM

import rows
from duramen.hardware.machine import current_memory, peak_memory
from duramen.ssm.mixer import ExactScans
from duramen.tokens.model import Reduced
from token_speed import MODELS, reduction

STOCK = "transformers, dense"
SUBJECTS = (STOCK, "dense", "utrc, 30% cut")


@torch.no_grad()
def worker(name: str, subject: str, length: int) -> None:
    """One prompt; prints GiB."""
    network = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    tokens = torch.randint(0, network.config.vocab_size, (1, length))
    way: AbstractContextManager[object] = nullcontext()
    if subject != STOCK:
        way = ExactScans(network) if subject == "dense" else Reduced(network, reduction(network, "utrc", 0.3, length))
    with way:
        before = current_memory()
        network(tokens, use_cache=False, logits_to_keep=1)
    print(json.dumps((peak_memory() - before) / 2**30))


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048, 8192])
    parser.add_argument("--worker", nargs=3)
    options = parser.parse_args()
    if options.worker:
        name, subject, length = options.worker
        worker(name, subject, int(length))
        return
    table = []
    for name in MODELS:
        for length in options.lengths:
            found: dict[str, float] = {}
            for subject in SUBJECTS:
                line = [sys.executable, __file__, "--worker", name, subject, str(length)]
                done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
                found[subject] = float(done.stdout.splitlines()[-1])
                peer = {} if subject == STOCK else {"peer": STOCK, "peer_value": found[STOCK]}
                case = f"{name}, {length} tokens"
                table.append(rows.row(case, "memory of a prompt", "GiB", subject, found[subject], samples=1, **peer))
                print(case, subject, round(found[subject], 3), flush=True)
            rows.write("token_memory", table)


if __name__ == "__main__":
    main()
