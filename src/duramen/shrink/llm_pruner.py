"""LLM-Pruner: Taylor importance of whole vectors or of single weights, from the gradient of one batch.

Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", arXiv 2305.11627. A baseline: the importance of that
paper on our groups, with heads folded in the right order and the Fisher term scaled as it should be (``order: mix``).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import Model
from duramen.registry import method
from duramen.shrink import fusion
from duramen.shrink.importance import Order
from duramen.shrink.model import ShrinkSettings, shrink_model


class Settings(ShrinkSettings):
    """Settings of LLM-Pruner."""

    grain: Literal["element", "vector"] = "element"
    """Absolute values of single weights are summed (`element`), or their signed sum over a row or column is taken (`vector`)."""
    order: Order = "first"
    """Terms of the salience."""
    gradient_sequences: int = Field(default=64, ge=1)
    """Sequences of the calibration text that gradients are taken of."""
    gradient_length: int = Field(default=128, ge=2)
    """Their length in tokens."""

    @property
    def fused(self) -> fusion.Settings:
        """The same as a fusion that trusts one score alone."""
        shared = {name: value for name, value in self.model_dump().items() if name != "grain"}
        return fusion.Settings(**shared, fusion="fixed", weight=float(self.grain == "vector"), coarse="batch")


@method("llm_pruner", title="LLM-Pruner", paper="arXiv 2305.11627", kind="shrink", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Cuts the units with the least Taylor importance; see ``shrink_model``."""
    chosen = Settings.model_validate(settings)
    return shrink_model(partial(fusion.score, chosen.fused), "llm_pruner", model, tokens, chosen, walk=walk)
