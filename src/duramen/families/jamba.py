"""Jamba: Mamba and attention blocks in turn, each with a gated MLP or with experts.

Experts are stored as one three-dimensional parameter per projection and stay as they are.
"""

from duramen.families.table import Family, Stacked, attention, gated_mlp, selective_mixer

FAMILY = Family(
    name="jamba",
    model_types=("jamba",),
    blocks="model.layers",
    stages=(
        *selective_mixer("mamba", step="dt_layernorm"),
        *attention("self_attn"),
        *gated_mlp("feed_forward"),
    ),
    stacked=(
        Stacked(
            "feed_forward.experts.gate_up_proj",
            ("feed_forward.experts.{}.gate_proj.weight", "feed_forward.experts.{}.up_proj.weight"),
        ),
        Stacked("feed_forward.experts.down_proj", ("feed_forward.experts.{}.down_proj.weight",)),
    ),
)
