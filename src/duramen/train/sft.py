"""Supervised tuning on TRL: answers are learned and questions only read; examples are packed best-fit, each apart from its neighbours."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from duramen.problem import Problem
from duramen.registry import Place, method
from duramen.train.data import examples, keeps_apart, tokenise
from duramen.train.stage import TOKENS, WORK, Stage
from duramen.train.text import read_corpus
from duramen.train.tuning import ExampleSettings, divided, tuned


class Settings(ExampleSettings):
    """Settings of supervised tuning."""

    data: Place
    """Examples: a jsonl file with `text`, `prompt` and `completion`, `instruction` and `output`, or `messages`; or `exercises`, which are made."""
    epochs: Annotated[float, Field(gt=0)] = 2
    """How often the examples are seen."""
    packing: bool = True
    """Whether examples share rows of `length`."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the tokens that are text of the stage `tokenize`, all of it learned, so that a model keeps what it learned from it; 0 for none."""


@method("sft", title="Supervised tuning", paper="arXiv 2203.02155, 2411.15124", kind="train", settings=Settings)
def apply(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Tunes a model on examples and writes ``model``.

    Args:
        stage: Has the model.
        settings: See ``Settings``.

    Returns:
        Examples, those without an answer that fits, losses, and what exercises it could do before and after.

    Raises:
        Problem: If the data is not there, or has nothing to learn.
    """
    return tuned(stage, settings, _trainer)


def _trainer(network: Any, tokenizer: Any, file: str, stage: Stage, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The trainer, and counts for the report."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    documents = [tokenise(parts, tokenizer, settings.length) for parts in examples(file, tokenizer)]
    fine = [each for each in documents if any(learned for _, learned in each[1:])]
    if len(fine) < 2:
        raise Problem(
            f"{settings.data} has nothing to learn: no target tokens in {len(documents) - len(fine)} of {len(documents)} rows.",
            why=f"no answer begins within {settings.length} tokens.", fix="a larger `length`, or other data.",
        )  # fmt: skip
    rows = [
        {"input_ids": [token for token, _ in each], "labels": [token if learned else -100 for token, learned in each]}
        for each in fine
    ]
    learned, aside = divided(rows, settings)
    replayed = text_again(stage, settings, sum(len(row["input_ids"]) for row in learned)) if settings.replay else []
    packed = settings.packing and keeps_apart(network, len(tokenizer))
    config = SFTConfig(
        max_length=settings.length, packing=packed, eval_packing=False, eval_strategy="steps", eval_steps=settings.every,
        average_tokens_across_devices=True, **settings.arguments(stage.folder / WORK),
    )  # fmt: skip
    trainer = SFTTrainer(
        network, config, train_dataset=Dataset.from_list(learned + replayed), eval_dataset=Dataset.from_list(aside), processing_class=tokenizer,
    )  # fmt: skip
    counts = {
        "examples": len(learned),
        "held_out_examples": len(aside),
        "without_target": len(documents) - len(fine),
        "packed": packed,
    }
    return trainer, counts | {"replayed_pieces": len(replayed)}


def text_again(stage: Stage, settings: Settings, tokens: int) -> list[dict[str, list[int]]]:
    """Pieces of the text that the tokens are of, evenly spread over it, so many that they are `replay` of all beside the tokens of the examples.

    Args:
        stage: Has the text's tokens.
        settings: See ``Settings``.
        tokens: Of the examples.

    Raises:
        Problem: If no stage left any.
    """
    corpus = read_corpus(stage.need(TOKENS, "sft"), "train", settings.length, 0, shared=False)
    pieces = [(source, number) for source, each in corpus.packed.items() for number in range(len(each.rows))]
    there = sum(corpus.targets(*piece) + 1 for piece in pieces)
    wanted = tokens * settings.replay / (1 - settings.replay)
    chosen = np.linspace(0, len(pieces) - 1, round(len(pieces) * min(1, wanted / there))).astype(int)
    whole = [corpus.row(*pieces[number])[0].astype(int).tolist() for number in chosen]
    return [{"input_ids": piece, "labels": [-100, *piece[1:]]} for piece in whole]
