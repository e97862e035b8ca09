"""Mamba-2: gate, x, B, C and step size all come from one input projection."""

from duramen.families.table import Family, Projection

FAMILY = Family(
    name="mamba2",
    model_types=("mamba2",),
    blocks="backbone.layers",
    stages=(
        (Projection("in", "mixer.in_proj"),),
        (Projection("out", "mixer.out_proj"),),
    ),
)
