"""Supervised tuning on TRL: answers are learned and questions only read; examples are packed best-fit, each apart from its neighbours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from duramen.problem import Problem
from duramen.registry import method
from duramen.train.data import examples, tokenise
from duramen.train.stage import Stage
from duramen.train.tuning import TuningSettings, divided, tuned


class Settings(TuningSettings):
    """Settings of supervised tuning."""

    data: str
    """Examples: a jsonl file with `text`, `prompt` and `completion`, `instruction` and `output`, or `messages`; or `exercises`, which are made."""
    epochs: Annotated[float, Field(gt=0)] = 2
    """How often the examples are seen."""
    packing: bool = True
    """Whether examples share rows of `length`."""


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
    return tuned(stage, settings, partial(_trainer, settings=settings, work=stage.folder / "work"))


def _trainer(network: Any, tokenizer: Any, file: str, *, settings: Settings, work: Path) -> tuple[Any, dict[str, Any]]:
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
    train, aside = (Dataset.from_list(part) for part in divided(rows, settings))
    config = SFTConfig(
        max_length=settings.length, packing=settings.packing, eval_packing=False, eval_strategy="steps", eval_steps=settings.every,
        average_tokens_across_devices=True, **settings.arguments(work),
    )  # fmt: skip
    trainer = SFTTrainer(network, config, train_dataset=train, eval_dataset=aside, processing_class=tokenizer)
    counts = {"examples": len(train), "held_out_examples": len(aside), "without_target": len(documents) - len(fine)}
    return trainer, counts
