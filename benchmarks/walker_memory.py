"""Claim: the walker's peak memory does not grow with the number of blocks.

    python benchmarks/walker_memory.py

Writes random checkpoints of 2, 4 and 8 blocks of Llama-7B's shape (4096/11008, 32,000 tokens of vocabulary, bfloat16; 0.4 GB a
block), prunes each from disk with Wanda in a process of its own, and takes the process's peak memory. Needs 8 GB of disk. The
peer is transformers, which holds the whole model. Writes benchmarks/results/walker_memory.csv. About 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
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


def prune(folder: str, state: str, method: str) -> None:
    """Worker: prunes from disk and prints the peak."""
    model = BlockModel.from_folder(Path(folder), dtype=torch.bfloat16)
    tokens = torch.randint(0, VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(0))
    walk = Walk(batch_size=2, store=BlockStore(Path(state), model.stored_name))
    get_method(method).apply(model, tokens, sparsity=0.5, walk=walk)
    print(json.dumps({"peak": peak_memory()}))


def load_whole(folder: str) -> None:
    """Worker: the peer's peak, by loading the model in plain transformers."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    network(torch.zeros(1, 256, dtype=torch.long))
    print(json.dumps({"peak": peak_memory()}))


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--method", default="wanda")
    options = parser.parse_args()
    table = []
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            folder.mkdir()
            write_checkpoint(folder, blocks)
            peaks = {
                name: json.loads(
                    subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
                )["peak"] / 2**30
                for name, words in {
                    "transformers, loaded whole": ["--load", str(folder)],
                    f"duramen {options.method}": ["--prune", str(folder), f"{place}/state", options.method],
                }.items()
            }  # fmt: skip
        peer = peaks["transformers, loaded whole"]
        for subject, value in peaks.items():
            more = {"peer": "transformers, loaded whole", "peer_value": peer} if subject.startswith("duramen") else {}
            case = f"4096/11008 bfloat16 from disk, 1,024 tokens, {blocks} blocks"
            table.append(rows.row(case, "peak memory", "GiB", subject, value, samples=1, **more))
        rows.write("walker_memory", table)
        print(blocks, peaks, flush=True)


if __name__ == "__main__":
    if "--prune" in sys.argv:
        prune(*sys.argv[2:])
    elif "--load" in sys.argv:
        load_whole(sys.argv[2])
    else:
        main()
