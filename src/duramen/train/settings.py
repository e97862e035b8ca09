"""What every step takes that trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from duramen.registry import Place, Settings
from duramen.train.schedule import Schedule


class ScheduleSettings(Settings):
    """How long and how fast."""

    steps: Annotated[int, Field(ge=1)] = 100
    """How many."""
    batch: Annotated[int, Field(ge=1)] = 8
    """Sequences of a step."""
    at_once: Annotated[int, Field(ge=1)] = 8
    """Sequences that run together; fewer take less memory and give the same."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the rate rises; then it falls to zero."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of a step's gradient."""
    every: Annotated[int, Field(ge=1)] = 10
    """Steps between checkpoints, at which the held-out loss is taken; the model is what it was at the best of them."""
    seed: int = 0
    """Of the order of what is learned, and of all else that is drawn."""

    @property
    def schedule(self) -> Schedule:
        """The same for the loop."""
        return Schedule(self.steps, self.batch, self.at_once, self.warmup, self.clip, self.every, self.seed)


class TrainSettings(ScheduleSettings):
    """How long, how fast, on what, and towards what."""

    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    """Share of the sequences that are not trained on."""
    data: Place = ""
    """Examples to learn instead of the recipe's text: a jsonl file with `text`, `prompt` and `completion`, `instruction` and `output`, or `messages`; only responses count."""
    recompute: bool = False
    """Whether blocks run again in the backward pass instead of keeping what is inside them: less memory, a third more time."""
    objective: Literal["auto", "ce", "distill"] = "auto"
    """`ce` learns the text, `distill` the text and the dense model's distributions; `auto` distils where there is a dense model."""
    distill_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the divergence from the dense model in `distill`."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """By which both models' logits are divided in the divergence, which then counts its square."""
    parent: Place = ""
    """The dense model: folder, embedded name, GGUF file or hub id; empty for the model that the recipe began with."""
    only: tuple[str, ...] = ()
    """Layers to change, by role (`down`), block range (`blocks:4-27`) or glob; empty means all."""
    skip: tuple[str, ...] = ()
    """Layers that stay, in the same words."""
