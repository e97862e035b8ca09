"""Zamba2: Mamba-2 blocks; some add a transformer block whose weights several of them share.

The shared transformer stays as it is: it would have to be solved for all its places at once.
"""

from duramen.families.table import Family, Projection

FAMILY = Family(
    name="zamba2",
    model_types=("zamba2",),
    blocks="model.layers",
    stages=(
        (Projection("in", "mamba.in_proj"),),
        (Projection("out", "mamba.out_proj"),),
        (Projection("linear", "linear"),),
        (Projection("in", "mamba_decoder.mamba.in_proj"),),
        (Projection("out", "mamba_decoder.mamba.out_proj"),),
    ),
)
