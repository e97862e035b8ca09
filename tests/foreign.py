"""A method of another package."""

from typing import Any

from duramen.calibrate.walker import Walk
from duramen.prune.magnitude import prune
from duramen.prune.model import PruneSettings, prune_model
from duramen.registry import Settings as MethodSettings
from duramen.registry import method


class Settings(MethodSettings):
    """Settings of thinning."""

    share: float = 0.5
    """That goes."""


@method("thin", title="Thinning", paper="", kind="prune", settings=Settings)
def apply(model: Any, tokens: Any, *, walk: Walk | None = None, **settings: object) -> Any:
    """Removes the smallest weights."""
    chosen = Settings.model_validate(settings)
    return prune_model(prune, model, tokens, PruneSettings(sparsity=chosen.share), walk=walk)
