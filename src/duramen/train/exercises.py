"""Small exercises of form whose answers a rule can check: counting, repeating, listing, spelling, telling even from odd.

They teach and measure whether a small model follows an instruction to the letter. Which exercises are held out follows from their own text, so that none of them is ever learned.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duramen.intervals import wilson_interval
from duramen.rundir import write_text

EXERCISES = "exercises"
COUNT = 12_000
HELD_OUT = 0.1
AT_ONCE, LONGEST = 50, 48
"""Prompts that are answered together, and most tokens of an answer."""
WORDS = [
    "apple",
    "bread",
    "chair",
    "river",
    "stone",
    "cloud",
    "grass",
    "horse",
    "light",
    "money",
    "music",
    "night",
    "paper",
    "plant",
    "queen",
    "round",
    "salt",
    "sand",
    "ship",
    "snow",
    "song",
    "star",
    "sugar",
    "table",
    "tiger",
    "train",
    "tree",
    "water",
    "wheel",
    "wind",
    "wood",
    "world",
    "year",
    "bird",
    "boat",
    "book",
    "bell",
    "coat",
    "corn",
    "door",
    "dust",
    "face",
    "farm",
    "fire",
    "fish",
    "gate",
    "gold",
    "hand",
    "hill",
    "home",
    "iron",
    "king",
    "lake",
    "leaf",
    "milk",
    "moon",
    "nail",
    "nest",
    "oil",
    "page",
    "park",
    "path",
    "rain",
    "ring",
    "road",
    "rock",
    "roof",
    "room",
    "rope",
    "rose",
    "sail",
    "seed",
    "shoe",
    "silk",
    "sky",
    "soil",
    "soup",
    "spoon",
    "stair",
    "storm",
    "street",
    "summer",
    "sun",
    "tail",
    "tent",
    "tower",
    "town",
    "wall",
    "wave",
    "week",
    "winter",
    "wolf",
]


def exercise(draw: random.Random) -> tuple[str, str, str]:
    """One exercise: its text, its answer, and a near miss."""
    kind = draw.randrange(5)
    if kind == 0:
        first, size = draw.randint(1, 90), draw.randint(3, 8)
        numbers = [str(first + number) for number in range(size)]
        wrong = numbers[:-1] if draw.random() < 0.5 else [*numbers, str(first + size)]
        return f"Count from {numbers[0]} to {numbers[-1]}.", ", ".join(numbers) + ".", ", ".join(wrong) + "."
    if kind == 1:
        word, times = draw.choice(WORDS), draw.randint(2, 5)
        return (
            f"Say {word} {times} times.",
            ", ".join([word] * times) + ".",
            ", ".join([word] * (times + draw.choice((-1, 1)))) + ".",
        )
    if kind == 2:
        words = draw.sample(WORDS, draw.randint(2, 4))
        lines = [f"- {word}" for word in words]
        return f"List these words: {', '.join(words)}.", "\n".join(lines), ", ".join(words)
    if kind == 3:
        spelt = draw.choice(WORDS)
        return f"Spell {spelt}.", "-".join(spelt), " ".join(spelt)
    number = draw.randint(1, 999)
    kinds = ("even", "odd")
    return f"Is {number} even or odd?", f"{number} is {kinds[number % 2]}.", f"{number} is {kinds[1 - number % 2]}."


def exercises(count: int, seed: int, *, held_out: bool) -> Iterator[dict[str, str]]:
    """So many different exercises: ``prompt``, ``chosen`` (the answer) and ``rejected`` (a near miss).

    Args:
        count: How many at most; there are fewer where the kinds are exhausted.
        seed: Of what is drawn.
        held_out: Those that are never learned, or the others.
    """
    draw, seen = random.Random(seed), set[str]()  # noqa: S311
    for _ in range(50 * count):
        if len(seen) == count:
            return
        prompt, answer, miss = exercise(draw)
        if prompt not in seen and is_held_out(prompt) == held_out:
            seen.add(prompt)
            yield {"prompt": prompt, "chosen": answer, "rejected": miss}


def is_held_out(prompt: str) -> bool:
    """Whether an exercise is never learned."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest()) < HELD_OUT * 2**32


def exercises_file(folder: Path, seed: int) -> str:
    """Writes exercises to learn as jsonl, also with ``completion`` and ``answer``; its path."""
    file = folder / "exercises.jsonl"
    if not file.is_file():
        rows = (
            {**row, "answer": row["chosen"], "instruction": row["prompt"], "output": row["chosen"]}
            for row in exercises(COUNT, seed, held_out=False)
        )
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@torch.no_grad()
def answered(network: Any, tokenizer: Any, count: int, seed: int) -> dict[str, Any] | None:
    """How many held-out exercises a model answers to the letter, greedily.

    Args:
        network: A causal language model.
        tokenizer: Its tokenizer; its chat template is used if it has one.
        count: How many exercises; 0 for none.
        seed: Of what is drawn.

    Returns:
        Share with its 95 % interval (Wilson), the number of exercises, and every one with its answer and what was said; None for no exercises.
    """
    if not count:
        return None
    rows = list(exercises(count, seed + 1, held_out=True))
    was = network.training
    network.eval()
    said = [text for start in range(0, len(rows), AT_ONCE) for text in _said(network, tokenizer, rows[start : start + AT_ONCE])]
    network.train(was)
    right = [text == row["chosen"] for row, text in zip(rows, said, strict=True)]
    shown = [[row["prompt"], row["chosen"], text] for row, text in zip(rows, said, strict=True)]
    share = wilson_interval(np.array(right, dtype=float))
    return {"share": share.value, "low": share.low, "high": share.high, "count": len(rows), "answers": shown}


def _said(network: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[str]:
    """Greedy answers; prompts are padded on the left."""
    asked = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    length = max(map(len, asked))
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(network.parameters()).device
    tokens = torch.tensor([[filler] * (length - len(ids)) + ids for ids in asked], device=device)
    seen = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in asked], device=device)
    found = network.generate(
        input_ids=tokens,
        attention_mask=seen,
        max_new_tokens=LONGEST,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=filler,
    )
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in found[:, length:]]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A question as the model is asked it."""
    if not tokenizer.chat_template:
        return list(tokenizer(f"{prompt}\n\n", add_special_tokens=False)["input_ids"])
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
