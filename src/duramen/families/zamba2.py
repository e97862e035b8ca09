"""Zamba2: Mamba-2 blocks; some add a transformer block whose weights several of them share.

The shared transformer stays as it is: it would have to be solved for all its places at once.
"""

from duramen.families.table import Family, Projection, dual_mixer

FAMILY = Family(
    name="zamba2",
    model_types=("zamba2",),
    blocks="model.layers",
    stages=(
        *dual_mixer("mamba"),
        (Projection("linear", "linear"),),
        *dual_mixer("mamba_decoder.mamba"),
    ),
)
