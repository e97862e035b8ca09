"""Jamba: Mamba and attention blocks in turn, each with a gated MLP or with experts.

Experts are stored as one three-dimensional parameter per projection and stay as they are.
"""

from duramen.families.table import Family, Projection, Stacked

FAMILY = Family(
    name="jamba",
    model_types=("jamba",),
    blocks="model.layers",
    stages=(
        (Projection("in", "mamba.in_proj"),),
        (Projection("x", "mamba.x_proj"),),
        (Projection("dt", "mamba.dt_proj", tap="mamba.dt_layernorm"),),
        (Projection("out", "mamba.out_proj"),),
        (Projection("q", "self_attn.q_proj"), Projection("k", "self_attn.k_proj"), Projection("v", "self_attn.v_proj")),
        (Projection("o", "self_attn.o_proj"),),
        (Projection("gate", "feed_forward.gate_proj"), Projection("up", "feed_forward.up_proj")),
        (Projection("down", "feed_forward.down_proj"),),
    ),
    stacked=(
        Stacked(
            "feed_forward.experts.gate_up_proj",
            ("feed_forward.experts.{}.gate_proj.weight", "feed_forward.experts.{}.up_proj.weight"),
        ),
        Stacked("feed_forward.experts.down_proj", ("feed_forward.experts.{}.down_proj.weight",)),
    ),
)
