"""Claim: the walker's peak memory does not grow with the number of blocks.

    python benchmarks/walker_memory.py
    python benchmarks/walker_memory.py --blocks 25 --method wanda           # 10.4 GB
    python benchmarks/walker_memory.py --blocks 1 2 --method multiweight --effort fast

Writes random checkpoints of so many blocks of Llama-7B's shape (4096/11008, 32,000 tokens of vocabulary, bfloat16; 0.4 GB a
block), prunes each from disk in a process of its own, and takes the process's peak memory and seconds. Needs twice the disk. The
peer is transformers, which holds the whole model. Adds to benchmarks/results/walker_memory.csv, and draws it into
docs/images/walker_memory.svg. About 15 minutes on 2 cores for 2, 4 and 8 blocks by Wanda.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import rows
from duramen.calibrate.walker import Walk
from duramen.families.checkpoint import INDEX
from duramen.families.model import BlockModel
from duramen.hardware.machine import peak_memory
from duramen.registry import get_method
from duramen.rundir import BlockStore

WIDTH, FFN, VOCABULARY = 4096, 11008, 32000
SHAPES = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{f"mlp.{name}_proj": (FFN, WIDTH) for name in ("gate", "up")},
    "mlp.down_proj": (WIDTH, FFN), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
}  # fmt: skip


def write_checkpoint(folder: Path, blocks: int) -> None:
    """One shard per block, so that no more than a block is ever in memory."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=blocks, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=VOCABULARY, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.manual_seed(0)
    outside = {
        "model.embed_tokens.weight": _random(VOCABULARY, WIDTH),
        "model.norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16),
    }
    places = dict.fromkeys(outside, "model-outside.safetensors")
    save_file(outside, folder / "model-outside.safetensors", {"format": "pt"})
    for index in range(blocks):
        tensors = {f"model.layers.{index}.{name}.weight": _random(*shape) for name, shape in SHAPES.items()}
        save_file(tensors, folder / f"model-{index}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(tensors, f"model-{index}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _random(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else (0.02 * torch.randn(shape)).bfloat16()


def prune(folder: str, state: str, method: str, effort: str) -> None:
    """Worker: prunes from disk and prints the peak."""
    start = time.perf_counter()
    model = BlockModel.from_folder(Path(folder), dtype=torch.bfloat16)
    tokens = torch.randint(0, VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(0))
    walk = Walk(batch_size=2, store=BlockStore(Path(state), model.stored_name))
    settings = {"effort": effort} if effort else {}
    get_method(method).apply(model, tokens, sparsity=0.5, walk=walk, **settings)
    print(json.dumps({"peak memory": peak_memory() / 2**30, "seconds": time.perf_counter() - start}))


def load_whole(folder: str) -> None:
    """Worker: the peer's peak, by loading the model in plain transformers."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    network(torch.zeros(1, 256, dtype=torch.long))
    print(json.dumps({"peak memory": peak_memory() / 2**30}))


PEER = "transformers, loaded whole"
UNITS = {"peak memory": "GiB", "seconds": "s"}


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--effort", default="")
    options = parser.parse_args()
    subject = f"duramen {options.method} {options.effort}".strip()
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            folder.mkdir()
            write_checkpoint(folder, blocks)
            found = {
                PEER: _worker("--load", str(folder)),
                subject: _worker("--prune", str(folder), f"{place}/state", options.method, options.effort),
            }
        case = f"4096/11008 bfloat16 from disk, 1,024 tokens, {blocks} blocks"
        table = [row for row in rows.read("walker_memory") if row["case"] != case or row["subject"] not in found]
        for name, figures in found.items():
            for metric, value in figures.items():
                peer = {"peer": PEER, "peer_value": found[PEER][metric]} if name != PEER and metric in found[PEER] else {}
                table.append(rows.row(case, metric, UNITS[metric], name, value, samples=1, **peer))
        rows.write("walker_memory", sorted(table, key=_blocks))
        draw()
        print(blocks, found, flush=True)


def _worker(*words: str) -> dict[str, float]:
    """What a process of its own prints last."""
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _blocks(row: dict[str, object]) -> int:
    return int(str(row["case"]).split()[-2])


def draw() -> None:
    """Draws all rows: memory and time against the number of blocks."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    table = rows.read("walker_memory")
    for axis, metric in zip(axes, UNITS, strict=True):
        for number, subject in enumerate(dict.fromkeys(str(row["subject"]) for row in table)):
            points = [row for row in table if (row["subject"], row["metric"]) == (subject, metric)]
            if points:
                axis.plot(
                    [_blocks(row) for row in points],
                    [float(str(row["value"])) for row in points],
                    "o-",
                    label=subject,
                    color=f"C{number}",
                )
        axis.set(xlabel="blocks of 0.4 GB", ylabel=f"{metric} ({UNITS[metric]})", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).parents[1] / "docs" / "images" / "walker_memory.svg", metadata={"Date": None})


if __name__ == "__main__":
    if "--prune" in sys.argv:
        prune(*sys.argv[2:])
    elif "--load" in sys.argv:
        load_whole(sys.argv[2])
    else:
        main()
