"""Group-relative policy optimisation on TRL (arXiv 2402.03300), with rewards that a rule decides.

For every prompt some answers are drawn, A = (R − mean)/std over its group, and −min(ρA, clip(ρ, 1 − ε, 1 + ε)A) + β·k is minimised, with ρ = π/π_old. The penalty e^d − d − 1 with
d = log π_ref − log π is an unbiased estimate of KL(π‖π_ref), but its gradient, taken as a loss, is that of KL(π_ref‖π); times ρ it has the right one too (arXiv 2512.02556), and k is
that by default. Variants: Dr. GRPO (no deviation, one constant length), DAPO (a wider
clip upwards, mean over tokens, answers that were cut off do not count), GSPO (one ratio for a whole answer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from duramen.problem import Exit, Problem
from duramen.registry import Place, method
from duramen.train.rewards import REWARDS, Reward
from duramen.train.stage import WORK, Stage
from duramen.train.tuning import TuningSettings, as_turns, read_pairs, tuned

VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group", "importance_sampling_level": "token"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "importance_sampling_level": "token"},
    "dapo": {
        "loss_type": "dapo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "epsilon_high": 0.28,
        "mask_truncated_completions": True,
    },
    "gspo": {"loss_type": "grpo", "scale_rewards": "group", "importance_sampling_level": "sequence"},
}
"""In TRL's words."""


class Settings(TuningSettings):
    """Settings of policy optimisation."""

    data: Place
    """Prompts: a jsonl file with `prompt` and `answer`; or `exercises`, which are made."""
    reward: Literal["exact", "near", "number", "pattern", "mathematics"] = "exact"
    """How an answer is judged by the expected one."""
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    """Which ratio, which scale, which mean."""
    steps: Annotated[int, Field(ge=1)] = 100
    """How many."""
    batch: Annotated[int, Field(ge=2)] = 64
    """Answers of a step, over all processes: prompts times `answers`."""
    at_once: Annotated[int, Field(ge=2)] = 64
    """Answers that are learned together."""
    answers: Annotated[int, Field(ge=2)] = 8
    """Drawn for every prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """At which they are drawn."""
    longest: Annotated[int, Field(ge=1)] = 48
    """Most tokens of an answer."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Of AdamW at its height."""
    beta: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the divergence from the model at the start."""
    penalty: Literal["corrected", "plain"] = "corrected"
    """Whether the divergence is weighed by the ratio, which gives it the gradient of KL(π‖π_ref), or not, as first published."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε."""


@method(
    "grpo",
    title="Group-relative policy optimisation",
    paper="arXiv 2402.03300, 2503.14476, 2503.20783",
    kind="train",
    settings=Settings,
)
def apply(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Tunes a model by rewards and writes ``model``.

    Args:
        stage: Has the model.
        settings: See ``Settings``.

    Returns:
        Prompts, rewards by step, groups without a difference, and what exercises it could do before and after.

    Raises:
        Problem: If groups do not fit the batch, or a reward cannot be taken; the row is shown.
    """
    if settings.batch % settings.answers or settings.at_once % settings.answers:
        raise Problem(
            f"Groups of {settings.answers} answers do not fill a batch of {settings.batch}, {settings.at_once} at once.",
            why="a group is judged as a whole.",
            fix=f"multiples of {settings.answers}.",
        )
    found = tuned(stage, settings, _trainer)
    even = found["logged"].get("frac_reward_zero_std", [])
    return found | {"rewards": found["logged"].get("reward", []), "groups_without_difference": sum(even) / max(1, len(even))}


def _trainer(network: Any, tokenizer: Any, file: str, stage: Stage, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The trainer, and counts for the report."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [
        {"prompt": as_turns(tokenizer, row["prompt"], "")[0], "answer": str(row["answer"])}
        for row in read_pairs(file, ("prompt", "answer"))[: settings.examples or None]
    ]
    config = GRPOConfig(
        **settings.arguments(stage.folder / WORK), max_steps=settings.steps, **VARIANTS[settings.variant],
        num_generations=settings.answers, max_completion_length=settings.longest, temperature=settings.temperature, beta=settings.beta,
        epsilon=settings.clip_ratio, use_bias_correction_kl=settings.penalty == "corrected", steps_per_generation=settings.parts, num_iterations=1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        network,
        reward_funcs=[judge(REWARDS[settings.reward])],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trainer, {"prompts": len(rows)}


def judge(reward: Reward) -> Callable[..., list[float]]:
    """A reward as TRL calls it: for a list of answers."""

    def judged(completions: list[Any], answer: list[str], **more: Any) -> list[float]:
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        found = []
        for text, expected in zip(texts, answer, strict=True):
            try:
                found.append(reward(text, expected))
            except Problem:
                raise
            except Exception as error:
                raise Problem(
                    f"The reward of an answer cannot be taken: {error}.", why=f"the answer is {text!r}, and {expected!r} is expected.",
                    fix="another `reward`, or expected answers that it understands.", code=Exit.CHECK_FAILED,
                ) from error  # fmt: skip
        return found

    return judged
