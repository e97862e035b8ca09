"""Mamba: one selective state-space mixer per block.

The mixer multiplies by ``dt_proj.weight`` without calling the layer; its input is the first columns of ``x_proj``'s output.
The convolution, A and D stay as they are.
"""

from duramen.families.table import Family, Projection

FAMILY = Family(
    name="mamba",
    model_types=("mamba",),
    blocks="backbone.layers",
    stages=(
        (Projection("in", "mixer.in_proj"),),
        (Projection("x", "mixer.x_proj"),),
        (Projection("dt", "mixer.dt_proj", tap="mixer.x_proj"),),
        (Projection("out", "mixer.out_proj"),),
    ),
)
