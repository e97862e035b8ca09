"""Bamba: Mamba-2 and attention blocks in turn, each with a gated MLP."""

from duramen.families.table import Family, attention, dual_mixer, gated_mlp

FAMILY = Family(
    name="bamba",
    model_types=("bamba",),
    blocks="model.layers",
    stages=(
        *dual_mixer("mamba"),
        *attention("self_attn"),
        *gated_mlp("feed_forward"),
    ),
)
