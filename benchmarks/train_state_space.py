"""Trains a small Mamba or Mamba-2 language model on bytes of the embedded texts, since no package ships one.

    python benchmarks/train_state_space.py mamba out/mamba --minutes 15

Writes a Hugging Face folder with a byte tokenizer. The seed is fixed; the number of steps depends on the machine, and is printed
with the loss in bits per byte on text that was not trained on.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
from transformers.models.mamba import modeling_mamba

from duramen.assets import read_text
from duramen.calibrate.tokens import byte_tokenizer

TEXTS, HELD_OUT = ("squad", "drop", "coqa", "sciriff"), "boolq"
SHARED = {"vocab_size": 259, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}
MODELS = {
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(hidden_size=192, num_hidden_layers=4, state_size=8, time_step_rank=16, use_cache=False, **SHARED)
    ),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(
            hidden_size=256, num_hidden_layers=6, state_size=32, num_heads=8, head_dim=64, n_groups=1, chunk_size=64,
            use_cache=False, **SHARED,
        )
    ),
}  # fmt: skip


class Recurrence(torch.autograd.Function):
    """h_t = a_t·h_{t−1} + b_t along the second axis of [B, T, E, N], with a backward pass that costs as much as the forward one.

    Plain autograd through a loop over t copies the whole tensor at every step, which makes training impossible on a CPU.
    """

    @staticmethod
    def forward(context: Any, decay: Tensor, drive: Tensor) -> Tensor:
        states = torch.empty_like(drive)
        state = torch.zeros_like(drive[:, 0])
        for t in range(drive.shape[1]):
            state = torch.addcmul(drive[:, t], decay[:, t], state)
            states[:, t] = state
        context.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        decay, states = context.saved_tensors
        drives = torch.empty_like(gradient)
        later = torch.zeros_like(gradient[:, 0])
        for t in reversed(range(gradient.shape[1])):
            later = gradient[:, t] + later
            drives[:, t] = later
            later = later * decay[:, t]
        decays = torch.zeros_like(drives)
        decays[:, 1:] = drives[:, 1:] * states[:, :-1]
        return decays, drives


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **more: Any) -> Tensor:
    """Mamba's selective scan in the place of transformers' own; u and delta [B, E, T], A [E, N], B and C [B, N, T]."""
    step = functional.softplus(delta + more["delta_bias"][:, None]).transpose(1, 2)
    drive = (step * u.transpose(1, 2))[..., None] * B.transpose(1, 2)[:, :, None]
    states = Recurrence.apply(torch.exp(step[..., None] * A), drive)
    scanned = torch.einsum("bten,bnt->bet", states, C) + more["D"][:, None] * u
    return scanned * functional.silu(more["z"])


def stream(names: tuple[str, ...], tokenizer: PreTrainedTokenizerFast, *, limit: int) -> Tensor:
    """Ids of the texts one after another, [n]."""
    whole = "\n\n".join(document for name in names for document in read_text(name))[:limit]
    parts = [whole[start : start + 100_000] for start in range(0, len(whole), 100_000)]
    return torch.tensor([token for part in parts for token in tokenizer(part)["input_ids"]])


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
    tokenizer = byte_tokenizer()
    data = stream(TEXTS, tokenizer, limit=8_000_000)
    unseen = stream((HELD_OUT,), tokenizer, limit=200_000)[: 32 * options.length].view(32, -1)
    network, upstream = MODELS[options.model](), modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = selective_scan
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
            print(f"{step} steps, {spent:.0%}, {loss.item() / math.log(2):.3f} bits per byte", flush=True)
    modeling_mamba.mamba_selective_scan = upstream
    network.eval()
    with torch.no_grad():
        losses = [float(network(part, labels=part).loss) for part in unseen.split(8)]
    print(f"{options.model}: {step} steps, unseen text {sum(losses) / len(losses) / math.log(2):.3f} bits per byte")
    network.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
