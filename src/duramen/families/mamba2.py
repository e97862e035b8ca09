"""Mamba-2: gate, x, B, C and step size all come from one input projection."""

from duramen.families.table import Family, dual_mixer

FAMILY = Family(
    name="mamba2",
    model_types=("mamba2",),
    blocks="backbone.layers",
    stages=dual_mixer("mixer"),
)
