"""GPT-2: Conv1D layers stored [I, O]; q, k and v lie side by side in one of them."""

from duramen.families.table import Family, Group, Member, Projection, one_head, unit_one

_KINDS = (("weight", 1), ("bias", 0))

FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    stages=(
        (Projection("qkv", "attn.c_attn", transposed=True),),
        (Projection("o", "attn.c_proj", transposed=True),),
        (Projection("up", "mlp.c_fc", transposed=True),),
        (Projection("down", "mlp.c_proj", transposed=True),),
    ),
    groups=(
        Group(
            "kv_group",
            lambda s: s.heads,
            "n_head",
            (
                *(
                    Member(f"attn.c_attn.{kind}", axis, one_head, offset)
                    for kind, axis in _KINDS
                    for offset in (lambda s: 0, lambda s: s.heads * s.head, lambda s: 2 * s.heads * s.head)
                ),
                Member("attn.c_proj.weight", 0, one_head, reads=True),
            ),
        ),
        Group(
            "ffn_channel",
            lambda s: s.ffn,
            "n_inner",
            (
                *(Member(f"mlp.c_fc.{kind}", axis, unit_one) for kind, axis in _KINDS),
                Member("mlp.c_proj.weight", 0, unit_one, reads=True),
            ),
        ),
        Group(
            "width",
            lambda s: s.width,
            "n_embd",
            (
                *(Member(f"{name}.weight", 0, unit_one, reads=True) for name in ("attn.c_attn", "mlp.c_fc")),
                *(Member(f"{name}.{kind}", axis, unit_one) for name in ("attn.c_proj", "mlp.c_proj") for kind, axis in _KINDS),
                *(Member(f"{name}.{kind}", 0, unit_one) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")),
                Member("transformer.wte.weight", 1, unit_one, outside=True),
                Member("transformer.wpe.weight", 1, unit_one, outside=True),
                *(Member(f"transformer.ln_f.{kind}", 0, unit_one, outside=True) for kind in ("weight", "bias")),
            ),
        ),
    ),
    ffn_key="n_inner",
)
