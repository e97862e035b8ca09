"""Claim: optimisation by rewards betters what supervised tuning left, on exercises that were never learned.

    python benchmarks/rewards.py --variants grpo dr_grpo dapo --seeds 0 1 2

Trains a small Llama on exercises alone until it does some of them (SFT), and goes on by rewards with every variant and seed. On the same 400 held-out exercises it takes, before and after, the mean reward of
eight sampled answers to each, which is what is optimised, and counts those that are answered to the letter greedily. Writes benchmarks/results/rewards.csv after every run; runs that stand there are left out. About fifteen minutes a run on 1 thread.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import rows
from duramen.intervals import mean_interval, paired_interval
from duramen.train import grpo, sft
from duramen.train.exercises import answered, exercises, prompt_ids
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
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=2)
    options = parser.parse_args()
    table = rows.read("rewards")
    with tempfile.TemporaryDirectory() as place:
        for seed in options.seeds:
            start, before = tuned(Path(place), seed, options.epochs)
            for variant in options.variants:
                case = f"exercises, {options.steps} steps of {options.batch} answers at {options.rate:g}, seed {seed}"
                if any((row["case"], row["subject"]) == (case, variant) for row in table):
                    continue
                stage = Stage(Path(place) / f"{variant}-{seed}", {"model": start}, seed)
                stage.folder.mkdir()
                settings = grpo.Settings(
                    data="exercises",
                    variant=variant,
                    reward="exact",
                    steps=options.steps,
                    batch=options.batch,
                    at_once=options.batch,
                    learning_rate=options.rate,
                    longest=32,
                    every=1000,
                    seed=seed,
                )
                found = grpo.apply(stage, settings)
                after = measures(stage.folder / "model", seed)
                for metric, values in after.items():
                    share, change = mean_interval(values), paired_interval(before[metric], values)
                    told = {"samples": ASKED, "low": share.low, "high": share.high} | rows.beside(
                        ("sft", float(before[metric].mean()))
                    )
                    table.append(rows.row(case, metric, "1", variant, share.value, **told))
                    told = {"samples": ASKED, "low": change.low, "high": change.high}
                    table.append(rows.row(case, f"{metric} above SFT's", "1", variant, change.value, **told))
                    print(case, variant, metric, before[metric].mean(), share, change, flush=True)
                print(
                    [round(float(np.mean(found["rewards"][at : at + 5])), 3) for at in range(0, options.steps, 5)], flush=True
                )
                rows.write("rewards", table)


def tuned(place: Path, seed: int, epochs: float) -> tuple[Path, dict[str, np.ndarray]]:
    """A model tuned on exercises alone, and what it does with held-out ones."""
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
    before = measures(stage.folder / "model", seed)
    print(seed, "after SFT", {metric: values.mean() for metric, values in before.items()}, flush=True)
    return stage.folder / "model", before


def measures(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """By held-out exercise: the mean reward of sampled answers, and whether the greedy one is right to the letter."""
    network, tokenizer = open_causal(folder), AutoTokenizer.from_pretrained(folder)
    told = answered(network, tokenizer, ASKED, 100)
    greedy = np.array([said == wanted for _, wanted, said in told["answers"]], dtype=float)
    return {"mean reward of samples": sampled(network, tokenizer, told["answers"], seed), "right to the letter": greedy}


@torch.no_grad()
def sampled(network, tokenizer, answers: list[list[str]], seed: int) -> np.ndarray:
    """Mean reward of eight answers to every exercise, drawn as they are in training."""
    torch.manual_seed(seed)
    found = []
    for start in range(0, len(answers), 50):
        part = answers[start : start + 50]
        asked = [prompt_ids(tokenizer, prompt) for prompt, _, _ in part]
        length = max(map(len, asked))
        tokens = torch.tensor([[tokenizer.pad_token_id] * (length - len(ids)) + ids for ids in asked])
        seen = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in asked])
        said = network.generate(
            input_ids=tokens, attention_mask=seen, max_new_tokens=32, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=8,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts = [tokenizer.decode(each[length:], skip_special_tokens=True).strip() for each in said]
        found += [np.mean([texts[8 * row + place] == wanted for place in range(8)]) for row, (_, wanted, _) in enumerate(part)]
    return np.array(found)


if __name__ == "__main__":
    main()
