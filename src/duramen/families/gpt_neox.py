"""GPT-NeoX and Pythia: q, k, v of each head lie together in one matrix; attention and MLP may run in parallel."""

from duramen.families.table import Family, Group, Member, Projection, Sizes, one_head, unit_one

KINDS = ("weight", "bias")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _three_heads(sizes: Sizes) -> int:
    return 3 * sizes.head


def stages(attention: str) -> tuple[tuple[Projection, ...], ...]:
    """The projections of a block whose attention has this name."""
    return (
        (Projection("qkv", f"{attention}.query_key_value"),),
        (Projection("o", f"{attention}.dense"),),
        (Projection("up", "mlp.dense_h_to_4h"),),
        (Projection("down", "mlp.dense_4h_to_h"),),
    )


def groups(attention: str, heads: str, outside: tuple[Member, ...]) -> tuple[Group, ...]:
    """What is coupled in such blocks: heads, whose number stands in the config under ``heads``, FFN channels, and the width with what has it ``outside``."""
    writers = (f"{attention}.dense", "mlp.dense_4h_to_h")
    return (
        Group(
            "kv_group",
            lambda s: s.heads,
            heads,
            (
                *(Member(f"{attention}.query_key_value.{kind}", 0, _three_heads) for kind in KINDS),
                Member(f"{attention}.dense.weight", 1, one_head, reads=True),
            ),
        ),
        Group(
            "ffn_channel",
            lambda s: s.ffn,
            "intermediate_size",
            (
                *(Member(f"mlp.dense_h_to_4h.{kind}", 0, unit_one) for kind in KINDS),
                Member("mlp.dense_4h_to_h.weight", 1, unit_one, reads=True),
            ),
        ),
        Group(
            "width",
            lambda s: s.width,
            "hidden_size",
            (
                Member(f"{attention}.query_key_value.weight", 1, unit_one, reads=True),
                Member("mlp.dense_h_to_4h.weight", 1, unit_one, reads=True),
                *(Member(f"{name}.{kind}", 0, unit_one) for name in (*writers, *_NORMS) for kind in KINDS),
                *outside,
            ),
        ),
    )


FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    stages=stages("attention"),
    groups=groups(
        "attention",
        "num_attention_heads",
        (
            Member("gpt_neox.embed_in.weight", 1, unit_one, outside=True),
            *(Member(f"gpt_neox.final_layer_norm.{kind}", 0, unit_one, outside=True) for kind in KINDS),
            Member("lm_head.weight", 1, unit_one, reads=True, outside=True),
        ),
    ),
    stored_as=(("lm_head.weight", "embed_out.weight"),),
)
