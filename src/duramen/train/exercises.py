"""Small exercises of form whose answers a rule can check: counting, repeating, listing, spelling, telling even from odd.

They teach and measure whether a small model follows an instruction to the letter. Which exercises are held out follows from their own text, so that none of them is ever learned.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        prompt: What is asked.
        answer: To the letter.
        miss: A near miss.
        form: What every answer of the right form matches.
    """

    prompt: str
    answer: str
    miss: str
    form: str


def exercise(draw: random.Random) -> Exercise:
    """One exercise of five kinds."""
    kind = draw.randrange(5)
    if kind == 0:
        first, size = draw.randint(1, 90), draw.randint(3, 8)
        numbers = [str(first + number) for number in range(size)]
        wrong = numbers[:-1] if draw.random() < 0.5 else [*numbers, str(first + size)]
        return Exercise(
            f"Count from {numbers[0]} to {numbers[-1]}.",
            ", ".join(numbers) + ".",
            ", ".join(wrong) + ".",
            rf"\d+(, \d+){{{size - 1}}}\.",
        )
    if kind == 1:
        word, times = draw.choice(WORDS), draw.randint(2, 5)
        said, missed = (", ".join([word] * count) + "." for count in (times, times + draw.choice((-1, 1))))
        return Exercise(f"Say {word} {times} times.", said, missed, rf"(\w+)(, \1){{{times - 1}}}\.")
    if kind == 2:
        words = draw.sample(WORDS, draw.randint(2, 4))
        lines = "\n".join(f"- {word}" for word in words)
        return Exercise(
            f"List these words: {', '.join(words)}.", lines, ", ".join(words), rf"- \w+(\n- \w+){{{len(words) - 1}}}"
        )
    if kind == 3:
        spelt = draw.choice(WORDS)
        return Exercise(f"Spell {spelt}.", "-".join(spelt), " ".join(spelt), rf"\w(-\w){{{len(spelt) - 1}}}")
    number = draw.randint(1, 999)
    kinds = ("even", "odd")
    return Exercise(
        f"Is {number} even or odd?",
        f"{number} is {kinds[number % 2]}.",
        f"{number} is {kinds[1 - number % 2]}.",
        r"\d+ is (even|odd)\.",
    )


def exercises(count: int, seed: int, *, held_out: bool) -> Iterator[Exercise]:
    """So many different exercises.

    Args:
        count: How many at most; there are fewer where the kinds are exhausted.
        seed: Of what is drawn.
        held_out: Those that are never learned, or the others.
    """
    draw, seen = random.Random(seed), set[str]()  # noqa: S311
    for _ in range(50 * count):
        if len(seen) == count:
            return
        found = exercise(draw)
        if found.prompt not in seen and is_held_out(found.prompt) == held_out:
            seen.add(found.prompt)
            yield found


def is_held_out(prompt: str) -> bool:
    """Whether an exercise is never learned."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest()) < HELD_OUT * 2**32


def exercises_file(folder: Path, seed: int) -> str:
    """Writes exercises to learn as jsonl, with the fields of all stages that learn them; its path."""
    file = folder / "exercises.jsonl"
    if not file.is_file():
        rows = (
            {
                "prompt": each.prompt, "chosen": each.answer, "rejected": each.miss, "answer": each.answer,
                "instruction": each.prompt, "output": each.answer,
            }
            for each in exercises(COUNT, seed, held_out=False)
        )  # fmt: skip
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@torch.no_grad()
def answered(network: Any, tokenizer: Any, count: int, seed: int) -> dict[str, Any] | None:
    """How many held-out exercises a model answers to the letter, and how many in the form that is asked for, greedily.

    Args:
        network: A causal language model.
        tokenizer: Its tokenizer; its chat template is used if it has one.
        count: How many exercises; 0 for none.
        seed: Of what is drawn.

    Returns:
        ``share`` to the letter and ``form``, each with its 95 % interval (Wilson), the ``count`` of exercises, and every one with its answer and what was said; None for no exercises.
    """
    if not count:
        return None
    rows = list(exercises(count, seed + 1, held_out=True))
    was = network.training
    network.eval()
    said = [text for start in range(0, len(rows), AT_ONCE) for text in _said(network, tokenizer, rows[start : start + AT_ONCE])]
    network.train(was)
    right = wilson_interval(np.array([text == row.answer for row, text in zip(rows, said, strict=True)], dtype=float))
    formed = wilson_interval(
        np.array([re.fullmatch(row.form, text) is not None for row, text in zip(rows, said, strict=True)], dtype=float)
    )
    answers = [[row.prompt, row.answer, text] for row, text in zip(rows, said, strict=True)]
    found = {"share": right.value, "low": right.low, "high": right.high, "count": len(rows), "answers": answers}
    return found | {"form": {"share": formed.value, "low": formed.low, "high": formed.high}}


def _said(network: Any, tokenizer: Any, rows: list[Exercise]) -> list[str]:
    """Greedy answers; prompts are padded on the left."""
    asked = [prompt_ids(tokenizer, row.prompt) for row in rows]
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
