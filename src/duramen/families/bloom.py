"""BLOOM: q, k, v of each head lie together in one matrix, as in GPT-NeoX; ALiBi slopes take the place of positions."""

from duramen.families.gpt_neox import KINDS, groups, stages
from duramen.families.table import Family, Member, unit_one

FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    blocks="transformer.h",
    stages=stages("self_attention"),
    groups=groups(
        "self_attention",
        "n_head",
        (
            Member("transformer.word_embeddings.weight", 1, unit_one, outside=True),
            *(
                Member(f"transformer.{name}.{kind}", 0, unit_one, outside=True)
                for name in ("word_embeddings_layernorm", "ln_f")
                for kind in KINDS
            ),
        ),
    ),
    slopes_key="alibi_heads",
)
