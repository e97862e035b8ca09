"""Claim: scoring units by gradients needs the memory of a block, not of the model and all of its gradients.

    python benchmarks/importance_memory.py

Writes random checkpoints of so many blocks of Llama-7B's shape (see walker_memory.py), takes Taylor scores of all FFN channels and KV groups from four
sequences of 256 tokens, and the process's peak memory. The peer is one backward pass through the loaded model, which holds all weights and all
gradients. Writes benchmarks/results/importance_memory.csv. About 10 minutes on 2 cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import rows
from duramen.calibrate.backward import walk_back
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.hardware.machine import peak_memory
from duramen.shrink.groups import find_units
from duramen.shrink.importance import Taylor
from walker_memory import VOCABULARY, write_checkpoint

PEER = "one backward pass, transformers"
SUBJECTS = {PEER: "--whole", "duramen, per sequence": "--second", "duramen, gradient of the batch": "--batch"}


def whole(folder: str) -> None:
    """Worker: weights and all gradients."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for sequence in _tokens():
        network(sequence[None], labels=sequence[None], use_cache=False).loss.backward()
    print(json.dumps(peak_memory() / 2**30))


def streamed(folder: str, coarse: str) -> None:
    """Worker: scores."""
    model = BlockModel.from_folder(Path(folder), dtype=torch.bfloat16)
    tokens = _tokens()
    order = "first" if coarse == "batch" else "second"
    taylor = Taylor(
        find_units(model, ("ffn_channel", "kv_group")), len(tokens), tokens.shape[1] - 1,
        order=order, coarse=coarse, give=lambda units, scores: None,
    )  # fmt: skip
    walk_back(model, tokens, taylor, walk=Walk())
    print(json.dumps(peak_memory() / 2**30))


def _tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Runs the table."""
    table = []
    for blocks in (2, 4, 8):
        found: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as place:
            write_checkpoint(Path(place), blocks)
            for subject, word in SUBJECTS.items():
                line = [sys.executable, __file__, word, place]
                done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
                found[subject] = float(done.stdout.splitlines()[-1])
        for subject, value in found.items():
            peer = {} if subject == PEER else {"peer": PEER, "peer_value": found[PEER]}
            case = f"4096/11008 bfloat16, 4 sequences of 256 tokens, {blocks} blocks"
            table.append(rows.row(case, "peak memory", "GiB", subject, value, samples=1, **peer))
        rows.write("importance_memory", table)
        print(blocks, found, flush=True)


if __name__ == "__main__":
    if "--whole" in sys.argv:
        whole(sys.argv[2])
    elif len(sys.argv) > 2:
        streamed(sys.argv[2], "batch" if "--batch" in sys.argv else "per_sequence")
    else:
        main()
