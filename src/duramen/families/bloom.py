"""BLOOM: q, k, v of each head lie together in one matrix; ALiBi slopes take the place of positions."""

from duramen.families.table import Family, Group, Member, Projection, Sizes, one_head, unit_one

_KINDS = ("weight", "bias")
_WRITERS = ("self_attention.dense", "mlp.dense_4h_to_h")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _three_heads(sizes: Sizes) -> int:
    return 3 * sizes.head


FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    blocks="transformer.h",
    stages=(
        (Projection("qkv", "self_attention.query_key_value"),),
        (Projection("o", "self_attention.dense"),),
        (Projection("up", "mlp.dense_h_to_4h"),),
        (Projection("down", "mlp.dense_4h_to_h"),),
    ),
    groups=(
        Group(
            "kv_group",
            lambda s: s.heads,
            "n_head",
            (
                *(Member(f"self_attention.query_key_value.{kind}", 0, _three_heads) for kind in _KINDS),
                Member("self_attention.dense.weight", 1, one_head, reads=True),
            ),
        ),
        Group(
            "ffn_channel",
            lambda s: s.ffn,
            "intermediate_size",
            (
                *(Member(f"mlp.dense_h_to_4h.{kind}", 0, unit_one) for kind in _KINDS),
                Member("mlp.dense_4h_to_h.weight", 1, unit_one, reads=True),
            ),
        ),
        Group(
            "width",
            lambda s: s.width,
            "hidden_size",
            (
                Member("self_attention.query_key_value.weight", 1, unit_one, reads=True),
                Member("mlp.dense_h_to_4h.weight", 1, unit_one, reads=True),
                *(Member(f"{name}.{kind}", 0, unit_one) for name in (*_WRITERS, *_NORMS) for kind in _KINDS),
                Member("transformer.word_embeddings.weight", 1, unit_one, outside=True),
                *(
                    Member(f"transformer.{name}.{kind}", 0, unit_one, outside=True)
                    for name in ("word_embeddings_layernorm", "ln_f")
                    for kind in _KINDS
                ),
            ),
        ),
    ),
    slopes_key="alibi_heads",
)
