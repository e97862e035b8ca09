"""Falcon Mamba: Mamba with norms on the step size, B and C; ``dt_proj`` reads the normed step size."""

from duramen.families.table import Family, Projection

FAMILY = Family(
    name="falcon_mamba",
    model_types=("falcon_mamba",),
    blocks="backbone.layers",
    stages=(
        (Projection("in", "mixer.in_proj"),),
        (Projection("x", "mixer.x_proj"),),
        (Projection("dt", "mixer.dt_proj", tap="mixer.dt_layernorm"),),
        (Projection("out", "mixer.out_proj"),),
    ),
)
