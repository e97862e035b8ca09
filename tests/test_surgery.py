"""Surgery: what is removed equals what is zeroed, in every family, with cache, batch and padding; and opens again."""

import pytest
import torch

import tiny
from duramen.families.model import BlockModel
from duramen.shrink.groups import find_units
from duramen.shrink.plan import Plan
from duramen.shrink.surgery import masked, shrunk

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi3", "opt", "bloom", "gpt_neox", "gpt2",
)  # fmt: skip


def random_plan(model, kinds, seed=0, **more):
    """Keeps other units in every block, and other numbers of them."""
    generator = torch.Generator().manual_seed(seed)
    kept = {kind: [] for kind in kinds}
    for units in find_units(model, kinds):
        if units.kind == "query_head":
            groups, each = units.sizes.groups, units.sizes.heads // units.sizes.groups
            count = 1 + units.block % each
            chosen = [
                group * each + int(slot)
                for group in range(groups)
                for slot in torch.randperm(each, generator=generator)[:count]
            ]
        else:
            count = max(1, units.count - 1 - units.block)
            chosen = torch.randperm(units.count, generator=generator)[:count].tolist()
        kept[units.kind].append(tuple(sorted(chosen)))
    return Plan("", len(model.blocks), {kind: tuple(blocks) for kind, blocks in kept.items()}, **more)


PLANS = {
    "ffn": (("ffn_channel",), {}),
    "kv groups": (("kv_group",), {}),
    "both": (("ffn_channel", "kv_group"), {}),
    "query heads": (("query_head",), {}),
    "query heads and kv groups": (("query_head", "kv_group"), {}),
    "attention of 1": (("ffn_channel",), {"skipped": {1: ("attention",)}}),
    "mlp of 0": (("kv_group",), {"skipped": {0: ("mlp",)}}),
    "block 1": (("ffn_channel",), {"dropped": (1,)}),
}


EVERY_HEAD_ALONE = ("opt", "bloom", "gpt_neox", "gpt2")
"""Families in which no query heads share a KV group."""
CASES = [
    (name, plan) for name in FAMILIES for plan in PLANS if name not in EVERY_HEAD_ALONE or "query_head" not in PLANS[plan][0]
]


@pytest.mark.parametrize(("name", "plan"), CASES)
@torch.no_grad()
def test_removed_equals_zeroed(name, plan):
    network = tiny.model(name)
    model = BlockModel.from_module(network)
    kinds, more = PLANS[plan]
    chosen = random_plan(model, kinds, **more)
    tokens = tiny.ids(3, 20)
    padding = torch.ones_like(tokens)
    padding[1, :7] = 0
    small = shrunk(model, chosen)
    with masked(model, chosen):
        expected = network(tokens).logits, network(tokens, attention_mask=padding).logits[1, 7:]
        greedy = network.generate(tokens[:1], max_new_tokens=6, do_sample=False, use_cache=False)
    found = small(tokens).logits, small(tokens, attention_mask=padding).logits[1, 7:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], network(tokens).logits, atol=1e-2)
    cached = small.generate(tokens[:1], max_new_tokens=6, do_sample=False)
    assert cached.tolist() == greedy.tolist()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())
