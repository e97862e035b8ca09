"""Llama and the families of its shape: gated MLP, separate projections, grouped KV heads, RMS norms.

Mistral, Qwen2 and Qwen3 (their q and k norms are shared by all heads), SmolLM3 and Gemma differ in norms, biases and masks only.
"""

from duramen.families.table import Family, Group, Member, attention, gated_mlp, one_head, query_group, unit_one

_HEADS = tuple(
    Member(f"self_attn.{name}.{kind}", 0, size)
    for name, size in (("q_proj", query_group), ("k_proj", one_head), ("v_proj", one_head))
    for kind in ("weight", "bias")
)

FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"),
    blocks="model.layers",
    stages=(
        *attention("self_attn"),
        *gated_mlp("mlp"),
    ),
    groups=(
        Group(
            "query_head",
            lambda s: s.heads,
            "num_attention_heads",
            (
                Member("self_attn.q_proj.weight", 0, one_head),
                Member("self_attn.q_proj.bias", 0, one_head),
                Member("self_attn.o_proj.weight", 1, one_head, reads=True),
            ),
        ),
        Group(
            "kv_group",
            lambda s: s.groups,
            "num_key_value_heads",
            (*_HEADS, Member("self_attn.o_proj.weight", 1, query_group, reads=True)),
        ),
        Group(
            "ffn_channel",
            lambda s: s.ffn,
            "intermediate_size",
            (
                *(
                    Member(f"mlp.{name}.{kind}", 0, unit_one)
                    for name in ("gate_proj", "up_proj")
                    for kind in ("weight", "bias")
                ),
                Member("mlp.down_proj.weight", 1, unit_one, reads=True),
            ),
        ),
        Group(
            "width",
            lambda s: s.width,
            "hidden_size",
            (
                *(Member(f"self_attn.{name}_proj.weight", 1, unit_one, reads=True) for name in "qkv"),
                *(Member(f"mlp.{name}_proj.weight", 1, unit_one, reads=True) for name in ("gate", "up")),
                *(Member(f"{name}.weight", 0, unit_one) for name in ("self_attn.o_proj", "mlp.down_proj")),
                *(Member(f"{name}.bias", 0, unit_one) for name in ("self_attn.o_proj", "mlp.down_proj")),
                *(
                    Member(f"{name}_layernorm.weight", 0, unit_one)
                    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
                ),
                Member("model.embed_tokens.weight", 1, unit_one, outside=True),
                Member("model.norm.weight", 0, unit_one, outside=True),
                Member("lm_head.weight", 1, unit_one, reads=True, outside=True),
            ),
        ),
    ),
)
