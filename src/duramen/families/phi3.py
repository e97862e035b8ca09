"""Phi-3: Llama's shape with q, k, v stacked in one matrix and gate, up in another."""

from duramen.families.table import Extent, Family, Group, Member, Projection, Sizes, one_head, query_group, unit_one

_QKV = "self_attn.qkv_proj.weight"
_GATE_UP = "mlp.gate_up_proj.weight"


def _keys(sizes: Sizes) -> int:
    return sizes.heads * sizes.head


def _values(sizes: Sizes) -> int:
    return (sizes.heads + sizes.groups) * sizes.head


_FFN: Extent = lambda s: s.ffn  # noqa: E731

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    blocks="model.layers",
    stages=(
        (Projection("qkv", "self_attn.qkv_proj"),),
        (Projection("o", "self_attn.o_proj"),),
        (Projection("gate_up", "mlp.gate_up_proj"),),
        (Projection("down", "mlp.down_proj"),),
    ),
    groups=(
        Group(
            "query_head",
            lambda s: s.heads,
            "num_attention_heads",
            (Member(_QKV, 0, one_head), Member("self_attn.o_proj.weight", 1, one_head, reads=True)),
        ),
        Group(
            "kv_group",
            lambda s: s.groups,
            "num_key_value_heads",
            (
                Member(_QKV, 0, query_group),
                Member(_QKV, 0, one_head, _keys),
                Member(_QKV, 0, one_head, _values),
                Member("self_attn.o_proj.weight", 1, query_group, reads=True),
            ),
        ),
        Group(
            "ffn_channel",
            _FFN,
            "intermediate_size",
            (
                Member(_GATE_UP, 0, unit_one),
                Member(_GATE_UP, 0, unit_one, _FFN),
                Member("mlp.down_proj.weight", 1, unit_one, reads=True),
            ),
        ),
        Group(
            "width",
            lambda s: s.width,
            "hidden_size",
            (
                Member(_QKV, 1, unit_one, reads=True),
                Member(_GATE_UP, 1, unit_one, reads=True),
                Member("self_attn.o_proj.weight", 0, unit_one),
                Member("mlp.down_proj.weight", 0, unit_one),
                Member("input_layernorm.weight", 0, unit_one),
                Member("post_attention_layernorm.weight", 0, unit_one),
                Member("model.embed_tokens.weight", 1, unit_one, outside=True),
                Member("model.norm.weight", 0, unit_one, outside=True),
                Member("lm_head.weight", 1, unit_one, reads=True, outside=True),
            ),
        ),
    ),
)
