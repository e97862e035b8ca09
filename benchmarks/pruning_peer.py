"""Question: against llm-compressor's SparseGPT and Wanda, how near to the dense model is Duramen, and how long does it take?

    python -m venv PEER && PEER/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python benchmarks/pruning_peer.py --peer-python PEER/bin/python --text wiki.test.raw

Same float32 model, same token ids, same targets and damping, one after another in one run, each in a process of its own; the
seconds are of pruning alone. Writes benchmarks/results/pruning_peer.csv. About 20 minutes on 2 cores; leave the machine idle.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rows
from duramen.assets import open_model
from duramen.calibrate.tokens import calibration_tokens, evaluation_tokens
from duramen.calibrate.walker import Walk
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity
from duramen.families.model import BlockModel
from duramen.hardware.machine import forward_dtype
from duramen.intervals import Measured, mean_interval
from duramen.registry import get_method
from peers import ask
from wikitext import literature
from worker import Work

CORPORA = ("squad", "coqa", "drop", "sciriff")
DAMPING = 0.01
WORKER = "--worker"
RUNS = (
    ("llmcompressor", "wanda", "float32"),
    ("duramen", "wanda", "float32"),
    ("llmcompressor", "sparsegpt", "float32"),
    ("duramen", "sparsegpt", "float32"),
    ("duramen", "multiweight fast", "float32"),
    ("duramen", "multiweight good", "float32"),
    ("duramen", "multiweight fast", "auto"),
    ("duramen", "multiweight good", "auto"),
)
"""Tool, method (and effort), type of the forward passes. The peer has no type of its own for them; ``auto`` is what Duramen takes by default."""


class Memory:
    """Keeps the finished blocks' matrices in memory, since the peer saves nothing while it is timed either."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def load(self, index: int) -> None:
        """Nothing was finished before."""

    def save(self, index: int, tensors: dict[str, torch.Tensor], *_: object) -> None:
        """Keeps one block."""
        self.tensors |= {name: tensor.clone() for name, tensor in tensors.items() if tensor.ndim == 2}


def prune_here(folder: str, tokens_file: str, method: str, target: str, dtype: str, out: str) -> None:
    """Worker: prunes the float32 weights by Duramen and writes them."""
    model = BlockModel.from_folder(Path(folder), dtype=forward_dtype(dtype))
    settings = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    method, _, effort = method.partition(" ")
    settings |= ({} if method == "wanda" else {"damping": DAMPING}) | ({"effort": effort} if effort else {})
    store = Memory()
    with Work() as work:
        get_method(method).apply(model, load_file(tokens_file)["tokens"], walk=Walk(store=store), **settings)
    work.hand_over(store.tensors, out, forward=str(model.dtype))


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--text", default="boolq")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--targets", nargs="*", default=["0.5", "2:4"])
    parser.add_argument("--peers", nargs="*", default=["wanda", "sparsegpt"])
    options = parser.parse_args()

    folder = open_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = calibration_tokens(tokenizer, CORPORA, sequences=options.sequences, length=options.length, seed=0)
    windows = evaluation_tokens(tokenizer, literature(options.text), length=options.window, windows=options.windows)
    dense = BlockModel.from_folder(folder)
    hidden = final_hidden(dense, windows)
    table = rows.read("pruning_peer")
    for target in options.targets:
        case = f"SmolLM2-135M, {tokens.numel()} tokens, {Path(options.text).name} {options.windows}x{options.window}, {target}"
        table = [row for row in table if row["case"] != case]
        peers: dict[str, dict[str, Measured]] = {}
        for tool, method, dtype in RUNS:
            if PEER[method] not in options.peers:
                continue
            subject = f"{tool} {method}" + (", default forward type" if dtype == "auto" else "")
            if tool == "llmcompressor":
                found, tensors = ask(options.peer_python, "peer_llmcompressor.py", folder, tokens, method, str(DAMPING), target)
            else:
                found, tensors = ask(sys.executable, "pruning_peer.py", folder, tokens, WORKER, method, target, dtype)
            measured = measure(folder, tensors, dense, hidden, windows)
            measured["seconds of pruning"] = Measured(found["seconds"], found["seconds"], found["seconds"], 1)
            if tool == "llmcompressor":
                peers[method] = measured
            for metric, value in measured.items():
                more = {"low": value.low, "high": value.high, "samples": value.samples}
                if tool == "duramen":
                    peer = peers[PEER[method]][metric].value
                    more |= {"peer": f"llmcompressor {PEER[method]}", "peer_value": peer}
                used = rows.versions(*(f"{tool}-{name}={version}" for name, version in found["versions"].items()))
                table.append(rows.row(case, metric, UNITS[metric], subject, value.value, versions=used, **more))
            rows.write("pruning_peer", table)
            print(target, subject, {name: round(value.value, 4) for name, value in measured.items()}, flush=True)


PEER = {"wanda": "wanda", "sparsegpt": "sparsegpt", "multiweight fast": "sparsegpt", "multiweight good": "sparsegpt"}
UNITS = {"perplexity": "1", "KL from dense": "nats", "share of zeros": "1", "seconds of pruning": "s"}


def measure(
    folder: Path, tensors: dict[str, torch.Tensor], dense: BlockModel, hidden: list, windows: torch.Tensor
) -> dict[str, Measured]:
    """Perplexity, KL and the share of zeros of a model with these weights."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    network.load_state_dict(tensors, strict=False)
    edited = BlockModel.from_module(network)
    found = divergence(dense, hidden, edited, final_hidden(edited, windows), windows)
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values()) / sum(tensor.numel() for tensor in tensors.values())
    return {
        "perplexity": perplexity(found.loss),
        "KL from dense": mean_interval(found.kl),
        "share of zeros": Measured(zeros, zeros, zeros, 1),
    }


if __name__ == "__main__":
    if WORKER in sys.argv:
        prune_here(*(word for word in sys.argv[1:] if word != WORKER))
    else:
        main()
