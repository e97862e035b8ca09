"""Claim: optimisation by rewards betters what supervised tuning left, on exercises that were never learned.

    python benchmarks/rewards.py --variants grpo dr_grpo dapo --seeds 0 1 2

Trains a small Llama on exercises alone until it does some of them (SFT), and goes on by rewards with every variant and seed; how many of 400 held-out exercises are answered to the letter is counted before
and after, on the same exercises. Writes benchmarks/results/rewards.csv after every run; runs that stand there are left out. About four minutes a run on 1 thread.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import rows
from duramen.intervals import paired_interval, wilson_interval
from duramen.train import grpo, sft
from duramen.train.exercises import answered, exercises
from duramen.train.folder import make_causal, open_causal, save_causal
from duramen.train.stage import Stage
from duramen.train.tokenizer import END, PAD, ROLES, TEMPLATE, learn

MODEL = {
    "model_type": "llama", "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 256,
}  # fmt: skip
ASKED = 400


def main() -> None:
    """Runs all variants and seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", nargs="*", default=list(grpo.VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=4)
    options = parser.parse_args()
    table = rows.read("rewards")
    with tempfile.TemporaryDirectory() as place:
        for seed in options.seeds:
            start, before = tuned(Path(place), seed, options.epochs)
            for variant in options.variants:
                case = f"exercises, {options.steps} steps of 64 answers, seed {seed}"
                if any((row["case"], row["subject"]) == (case, variant) for row in table):
                    continue
                stage = Stage(Path(place) / f"{variant}-{seed}", {"model": start}, seed)
                stage.folder.mkdir()
                settings = grpo.Settings(
                    data="exercises",
                    variant=variant,
                    reward="exact",
                    steps=options.steps,
                    learning_rate=options.rate,
                    longest=32,
                    every=1000,
                    seed=seed,
                )
                found = grpo.apply(stage, settings)
                after = right(stage.folder / "model", seed)
                share, change = wilson_interval(after), paired_interval(before, after)
                print(
                    case,
                    variant,
                    before.mean(),
                    share,
                    change,
                    np.mean(found["rewards"][:5]),
                    np.mean(found["rewards"][-5:]),
                    flush=True,
                )
                more = {"samples": ASKED, "peer": "sft", "peer_value": float(before.mean())}
                table.append(rows.row(case, "share right", "1", variant, share.value, low=share.low, high=share.high, **more))
                table.append(
                    rows.row(
                        case,
                        "share right above SFT's",
                        "1",
                        variant,
                        change.value,
                        low=change.low,
                        high=change.high,
                        samples=ASKED,
                    )
                )
                rows.write("rewards", table)


def tuned(place: Path, seed: int, epochs: float) -> tuple[Path, np.ndarray]:
    """A model tuned on exercises alone, and which held-out ones it does."""
    texts = [f"{row.prompt} {row.answer}" for row in exercises(4000, seed, held_out=False)]
    inner = learn(iter(texts), 480)
    spoken = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=PAD, additional_special_tokens=list(ROLES)
    )
    spoken.chat_template = TEMPLATE
    spoken.save_pretrained(place / f"tokenizer-{seed}")
    save_causal(make_causal(MODEL, len(spoken), seed), place / f"new-{seed}", place / f"tokenizer-{seed}")
    stage = Stage(place / f"sft-{seed}", {"model": place / f"new-{seed}"}, seed)
    stage.folder.mkdir()
    settings = sft.Settings(
        data="exercises",
        epochs=epochs,
        batch=8,
        at_once=8,
        length=256,
        learning_rate=2e-3,
        every=1000,
        seed=seed,
        held_out=0.02,
    )
    print(seed, sft.apply(stage, settings)["losses"][-1], flush=True)
    before = right(stage.folder / "model", seed)
    print(seed, "after SFT", before.mean(), flush=True)
    return stage.folder / "model", before


def right(folder: Path, seed: int) -> np.ndarray:
    """Which of the held-out exercises a model answers to the letter."""
    torch.manual_seed(seed)
    found = answered(open_causal(folder), AutoTokenizer.from_pretrained(folder), ASKED, 100)
    return np.array([said == wanted for _, wanted, said in found["answers"]], dtype=float)


if __name__ == "__main__":
    main()
