"""OPT: separate projections with biases, ReLU MLP, learned positions."""

from duramen.families.table import Family, Group, Member, Projection, one_head, unit_one

_KINDS = ("weight", "bias")

FAMILY = Family(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    stages=(
        (Projection("q", "self_attn.q_proj"), Projection("k", "self_attn.k_proj"), Projection("v", "self_attn.v_proj")),
        (Projection("o", "self_attn.out_proj"),),
        (Projection("up", "fc1"),),
        (Projection("down", "fc2"),),
    ),
    groups=(
        Group(
            "kv_group",
            lambda s: s.heads,
            "num_attention_heads",
            (
                *(Member(f"self_attn.{name}_proj.{kind}", 0, one_head) for name in "qkv" for kind in _KINDS),
                Member("self_attn.out_proj.weight", 1, one_head, reads=True),
            ),
        ),
        Group(
            "ffn_channel",
            lambda s: s.ffn,
            "ffn_dim",
            (*(Member(f"fc1.{kind}", 0, unit_one) for kind in _KINDS), Member("fc2.weight", 1, unit_one, reads=True)),
        ),
        Group(
            "width",
            lambda s: s.width,
            "hidden_size",
            (
                *(Member(f"self_attn.{name}_proj.weight", 1, unit_one, reads=True) for name in "qkv"),
                Member("fc1.weight", 1, unit_one, reads=True),
                *(Member(f"{name}.{kind}", 0, unit_one) for name in ("self_attn.out_proj", "fc2") for kind in _KINDS),
                *(
                    Member(f"{name}.{kind}", 0, unit_one)
                    for name in ("self_attn_layer_norm", "final_layer_norm")
                    for kind in _KINDS
                ),
                Member("model.decoder.embed_tokens.weight", 1, unit_one, outside=True),
                Member("model.decoder.embed_positions.weight", 1, unit_one, outside=True),
                *(Member(f"model.decoder.final_layer_norm.{kind}", 0, unit_one, outside=True) for kind in _KINDS),
            ),
        ),
    ),
    ffn_key="ffn_dim",
)
