"""Bamba: Mamba-2 and attention blocks in turn, each with a gated MLP."""

from duramen.families.table import Family, Projection

FAMILY = Family(
    name="bamba",
    model_types=("bamba",),
    blocks="model.layers",
    stages=(
        (Projection("in", "mamba.in_proj"),),
        (Projection("out", "mamba.out_proj"),),
        (Projection("q", "self_attn.q_proj"), Projection("k", "self_attn.k_proj"), Projection("v", "self_attn.v_proj")),
        (Projection("o", "self_attn.o_proj"),),
        (Projection("gate", "feed_forward.gate_proj"), Projection("up", "feed_forward.up_proj")),
        (Projection("down", "feed_forward.down_proj"),),
    ),
)
