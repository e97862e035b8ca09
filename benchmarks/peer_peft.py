"""Claim: a training step of our adapters takes at most what one of PEFT's takes, and goes the same way.

    python benchmarks/peer_peft.py --steps 20 --batch 2 --length 128

Adapts SmolLM2-135M twice with the same settings and the same start (rank 16, α 16, α/√r, all linear layers), by Duramen and by PEFT, and trains both
on the same tokens by the same loss and optimizer, step by step in turns. Measures the seconds of a step, and how far the losses
differ at most. Writes benchmarks/results/peer_peft.csv.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rows
from duramen.assets import open_model
from duramen.calibrate.tokens import calibration_tokens
from duramen.families.model import BlockModel
from duramen.hardware.clock import now
from duramen.hardware.machine import fastest_device
from duramen.recover.rora import Settings, adapted, groups
from duramen.train.data import Rows
from duramen.train.models import Course
from duramen.train.objective import NextTokens
from pruning_quality import CORPORA

RANK, RATE = 16, 3e-4


def main() -> None:
    """Trains both side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", nargs="*", default=list(CORPORA))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    folder, device = open_model(options.model), fastest_device()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = options.steps * options.batch
    tokens = calibration_tokens(tokenizer, options.calibration, sequences=count, length=options.length, seed=0).to(device)
    mine, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype).to(device) for _ in range(2))
    settings = Settings(rank=RANK, learning_rate=RATE, objective="ce")
    with adapted(mine, BlockModel.from_module(mine), settings) as adapters:
        config = LoraConfig(
            r=RANK, lora_alpha=settings.alpha, use_rslora=True, target_modules=sorted(adapters), lora_dropout=0.0, bias="none"
        )
        theirs = get_peft_model(other, config).eval()
        found = dict(theirs.named_modules())
        with torch.no_grad():
            for name, adapter in adapters.items():
                found[f"base_model.model.{name}"].lora_A["default"].weight.copy_(adapter.a)
        trainable = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
        subjects: dict[str, tuple[nn.Module, Any]] = {
            "duramen": (mine, torch.optim.AdamW(groups(adapters, settings), weight_decay=0.0)),
            "peft": (theirs, torch.optim.AdamW([{"params": trainable, "lr": RATE}], weight_decay=0.0)),
        }
        losses: dict[str, list[float]] = {name: [] for name in subjects}
        seconds: dict[str, list[float]] = {name: [] for name in subjects}
        for step in range(options.steps):
            batch = Rows.whole(tokens[step * options.batch : (step + 1) * options.batch])
            for name in sorted(subjects, reverse=bool(step % 2)):
                network, optimizer = subjects[name]
                start = now()
                loss = NextTokens(Course(network, None, batch, batch)).loss(range(options.batch)) / int(batch.learned.sum())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds[name].append(now() - start)
                losses[name].append(float(loss.detach()))
    ratios = np.array(seconds["duramen"][2:]) / np.array(seconds["peft"][2:])
    low, high = np.percentile(ratios, [25, 75])
    medians = {name: float(np.median(found[2:])) for name, found in seconds.items()}
    apart = float(np.abs(np.array(losses["duramen"]) - np.array(losses["peft"])).max())
    place = "GPU" if device.type == "cuda" else "processor"
    case = (
        f"smollm2-135m, rank {RANK}, {options.steps} steps of {options.batch}x{options.length}, {options.dtype} on the {place}"
    )
    version = {"versions": rows.versions(f"peft={importlib.metadata.version('peft')}")}
    table = [row for row in rows.read("peer_peft") if (row["case"], row["machine"]) != (case, rows.machine())]
    peer = {"peer": "peft", "peer_value": medians["peft"]}
    table += [
        rows.row(case, "seconds a step", "s", "duramen", medians["duramen"], samples=len(ratios), **peer, **version),
        rows.row(
            case,
            "seconds a step, in turns",
            "1",
            "duramen / peft",
            float(np.median(ratios)),
            low=low,
            high=high,
            samples=len(ratios),
            **version,
        ),
        rows.row(case, "largest difference of the losses", "nats", "duramen", apart, samples=options.steps, **version),
    ]
    rows.write("peer_peft", table)
    print(
        medians, "ratio", np.median(ratios), (low, high), "losses", losses["duramen"][:2], losses["duramen"][-1], "apart", apart
    )


if __name__ == "__main__":
    main()
