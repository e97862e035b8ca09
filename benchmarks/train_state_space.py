"""Trains a small Mamba or Mamba-2 language model on the embedded texts, since no package ships one.

    python benchmarks/train_state_space.py mamba out/mamba --minutes 15
    python benchmarks/train_state_space.py mamba2-words out/mamba2-words --minutes 30 --length 512 --batch 8

Writes a Hugging Face folder: ``mamba`` and ``mamba2`` read bytes, ``mamba2-words`` a vocabulary of 2048 pieces that is made from the same texts. The layers run
on our scans. The seed is fixed; the number of steps depends on the machine, and is printed with the loss in bits per byte on text that was not trained on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from duramen.assets import read_text
from duramen.calibrate.tokens import byte_tokenizer
from duramen.ssm.mixer import ExactScans

TEXTS, HELD_OUT = ("squad", "drop", "coqa", "sciriff"), "boolq"
CHARACTERS, UNSEEN = 8_000_000, 100_000
"""Read of each for a byte model; of the pieces four times as many are read, as a piece is some four bytes."""
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
BYTES = {"vocab_size": 259, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256, "use_cache": False}
PIECES = {"vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}


@dataclass(frozen=True)
class Kind:
    """A model that can be trained: its network, and how much of the texts its tokenizer is made from; 0 for bytes."""

    network: Callable[[], Any]
    characters: int = 0


MODELS = {
    "mamba": Kind(
        lambda: MambaForCausalLM(MambaConfig(hidden_size=192, num_hidden_layers=4, state_size=8, time_step_rank=16, **BYTES))
    ),
    "mamba2": Kind(lambda: Mamba2ForCausalLM(_mamba2(hidden_size=256, num_hidden_layers=6, num_heads=8, **BYTES))),
    "mamba2-words": Kind(
        lambda: Mamba2ForCausalLM(
            _mamba2(hidden_size=192, num_hidden_layers=8, num_heads=6, tie_word_embeddings=True, **PIECES)
        ),
        4 * CHARACTERS,
    ),
}


def _mamba2(**more: Any) -> Mamba2Config:
    return Mamba2Config(state_size=32, head_dim=64, n_groups=1, chunk_size=64, **more)


def piece_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2048 pieces, made from a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES["vocab_size"],
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def whole(names: tuple[str, ...], limit: int) -> str:
    """The beginnings of some texts, of the same length each, one after another."""
    return "\n\n".join("\n\n".join(read_text(name))[: limit // len(names)] for name in names)


def ids(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Ids of a text, [n]."""
    parts = [text[start : start + 100_000] for start in range(0, len(text), 100_000)]
    return torch.tensor([token for row in tokenizer(parts)["input_ids"] for token in row])


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=4e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    kind = MODELS[options.model]
    text = whole(TEXTS, kind.characters or CHARACTERS)
    tokenizer = piece_tokenizer(text) if kind.characters else byte_tokenizer()
    data, network = ids(text, tokenizer), kind.network()
    print(f"{len(data):,} tokens, {sum(each.numel() for each in network.parameters()):,} parameters", flush=True)
    with ExactScans(network):
        train(network, data, options)
        loss = unseen_loss(network, tokenizer, options.length)
    print(f"unseen text {loss / math.log(2):.3f} bits per byte")
    network.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


def train(network: nn.Module, data: Tensor, options: argparse.Namespace) -> None:
    """AdamW over random windows, with a rate that falls to a twentieth as the minutes pass."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.05)
    start, step = time.perf_counter(), 0
    while (spent := (time.perf_counter() - start) / 60 / options.minutes) < 1:
        rate = options.rate * min(1, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * spent)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        places = torch.randint(0, len(data) - options.length, (options.batch,))
        batch = torch.stack([data[place : place + options.length] for place in places])
        loss = network(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"{step} steps, {spent:.0%}, {loss.item():.3f} nats per token", flush=True)
    network.eval()


@torch.no_grad()
def unseen_loss(network: nn.Module, tokenizer: PreTrainedTokenizerFast, length: int) -> float:
    """Nats per byte on the beginning of a text that was not trained on."""
    text = whole((HELD_OUT,), UNSEEN)
    tokens = ids(text, tokenizer)
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    losses = [float(network(part, labels=part).loss) * len(part) for part in windows.split(8)]
    per_token = sum(losses) / len(windows)
    return per_token * len(tokens) / len(text.encode())


if __name__ == "__main__":
    main()
