"""Falcon Mamba: Mamba with norms on the step size, B and C; ``dt_proj`` reads the normed step size."""

from duramen.families.table import Family, selective_mixer

FAMILY = Family(
    name="falcon_mamba",
    model_types=("falcon_mamba",),
    blocks="backbone.layers",
    stages=selective_mixer("mixer", step="dt_layernorm"),
)
