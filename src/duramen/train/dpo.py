"""Direct preference optimisation on TRL (arXiv 2305.18290), by default per token of each answer, as Moxin and Tülu 3 do (arXiv 2411.15124).

With Δ the sum over an answer of log π − log π_ref, the loss of a pair is −log σ(β(Δ_w/|y_w| − Δ_l/|y_l|)), and −log σ(β(Δ_w − Δ_l)) without the division. The reference's log-probabilities are taken once,
before the first step.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from duramen.problem import Problem
from duramen.registry import Place, method
from duramen.train.stage import WORK, Stage
from duramen.train.tuning import ExampleSettings, as_turns, divided, read_pairs, tuned

LOSSES = {"length_normalised": "sigmoid_norm", "plain": "sigmoid"}
"""TRL's names."""


class Settings(ExampleSettings):
    """Settings of preference optimisation."""

    data: Place
    """Pairs: a jsonl file with `prompt`, `chosen` and `rejected`, as texts or turns; or `exercises`, which are made."""
    loss: Literal["length_normalised", "plain"] = "length_normalised"
    """Whether an answer's log-ratio is divided by its tokens."""
    beta: Annotated[float, Field(gt=0)] = 5.0
    """How strongly the model is held to the reference; about 0.1 for `plain`."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """Of AdamW at its height."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the rate rises; then it falls to zero in a line."""


@method("dpo", title="Direct preference optimisation", paper="arXiv 2305.18290, 2411.15124", kind="train", settings=Settings)
def apply(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Tunes a model on pairs of answers and writes ``model``.

    Args:
        stage: Has the model.
        settings: See ``Settings``.

    Returns:
        Pairs, losses, margins, and what exercises it could do before and after.

    Raises:
        Problem: If a pair is two of the same, or an answer is empty.
    """
    return tuned(stage, settings, _trainer)


def _trainer(network: Any, tokenizer: Any, file: str, stage: Stage, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The trainer, and counts for the report."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = read_pairs(file, ("prompt", "chosen", "rejected"))
    pairs = []
    for number, row in enumerate(rows, 1):
        if row["chosen"] == row["rejected"]:
            raise Problem(
                f"Example {number} of {settings.data} prefers an answer to itself.",
                why="`chosen` and `rejected` are the same.",
                fix="take it out.",
            )
        (prompt, chosen), (_, rejected) = (as_turns(tokenizer, row["prompt"], row[key]) for key in ("chosen", "rejected"))
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    train, aside = (Dataset.from_list(part) for part in divided(pairs, settings))
    config = DPOConfig(
        loss_type=[LOSSES[settings.loss]], beta=settings.beta, max_length=settings.length, precompute_ref_log_probs=True, eval_strategy="steps",
        eval_steps=settings.every, disable_dropout=True, **settings.arguments(stage.folder / WORK),
    )  # fmt: skip
    trainer = DPOTrainer(network, None, config, train_dataset=train, eval_dataset=aside, processing_class=tokenizer)
    counts = {"examples": len(train), "held_out_examples": len(aside)}
    return trainer, counts
