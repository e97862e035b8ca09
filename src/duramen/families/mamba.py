"""Mamba: one selective state-space mixer per block.

The mixer multiplies by ``dt_proj.weight`` without calling the layer; its input is the first columns of ``x_proj``'s output.
The convolution, A and D stay as they are.
"""

from duramen.families.table import Family, selective_mixer

FAMILY = Family(
    name="mamba",
    model_types=("mamba",),
    blocks="backbone.layers",
    stages=selective_mixer("mixer", step="x_proj"),
)
