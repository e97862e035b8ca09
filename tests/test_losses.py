"""Losses of attention maps and of the spread of queries and keys: zero for what is equal, falling as it agrees, blind to what may not be seen."""

import math

import pytest
import torch

from duramen.attention import Seen
from duramen.quantize.losses import code_entropy, entropy_loss, map_loss

MAPS = ("row_kl", "row_cos", "log_cos", "out_mse", "logit_mse")
ENTROPIES = ("match", "gauss_kl", "paper", "code")


def seen(seed, batch=2, heads=4, groups=2, length=6, width=4, mask=None):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, width, generator=generator)
    key, value = (torch.randn(batch, groups, length, width, generator=generator) for _ in range(2))
    return Seen(query, key, value, mask, None, None)


def learning(each):
    for tensor in (each.query, each.key, each.value):
        tensor.requires_grad_()
    return each


WANTED = torch.tensor([[True] * 5 + [False], [True, True, False, True, True, False]])


def maps(each):
    """The attention maps, computed plainly."""
    keys = each.key.repeat_interleave(2, 1)
    logits = each.query @ keys.transpose(2, 3) / each.query.shape[-1] ** 0.5
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)


@pytest.mark.parametrize("kind", MAPS)
def test_equal_maps_cost_nothing_and_one_step_brings_others_nearer(kind):
    """The printed loss, +log of the cosines, fails here: a step on it takes the maps apart."""
    teacher = seen(1)
    assert float(map_loss(kind, [seen(1)], [teacher], WANTED)) == pytest.approx(0, abs=1e-5)
    mine = learning(seen(2))
    before = torch.cosine_similarity(maps(mine), maps(teacher), dim=-1)[WANTED[:, None].expand(-1, 4, -1)].mean()
    loss = map_loss(kind, [mine], [teacher], WANTED)
    loss.backward()
    loss = loss.detach()
    assert float(loss) > 0
    with torch.no_grad():
        moved = Seen(
            *(
                each - 0.05 * each.grad / each.grad.norm() if each.grad is not None else each
                for each in (mine.query, mine.key, mine.value)
            ),
            None,
            None,
            None,
        )
        assert float(map_loss(kind, [moved], [teacher], WANTED)) < float(loss)
        after = torch.cosine_similarity(maps(moved), maps(teacher), dim=-1)[WANTED[:, None].expand(-1, 4, -1)].mean()
        if kind != "out_mse":
            assert after > before
    printed = maps(mine)
    printed = torch.cosine_similarity(printed.flatten(2), maps(teacher).flatten(2), dim=-1).mean().log()
    mine.query.grad = mine.key.grad = None
    printed.backward()
    with torch.no_grad():
        apart = Seen(mine.query - 0.05 * mine.query.grad / mine.query.grad.norm(), mine.key, mine.value, None, None, None)
        assert torch.cosine_similarity(maps(apart).flatten(2), maps(teacher).flatten(2), dim=-1).mean().log() < printed


def test_a_row_of_the_divergence_is_what_it_says():
    mine, teacher = seen(3), seen(4)
    plain = (maps(teacher) * (maps(teacher).log() - maps(mine).log())).nan_to_num().sum(-1).mean(1)
    torch.testing.assert_close(map_loss("row_kl", [mine], [teacher], WANTED), plain[WANTED].sum())
    cosines = torch.stack([
        torch.stack([torch.cosine_similarity(maps(mine)[row, head][WANTED[row]].flatten(), maps(teacher)[row, head][WANTED[row]].flatten(), dim=0) for head in range(4)])
        for row in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(map_loss("log_cos", [mine], [teacher], WANTED), -(cosines.mean(1).log() * WANTED.sum(1)).sum())


@pytest.mark.parametrize("kind", MAPS)
def test_what_may_not_be_seen_has_no_effect(kind):
    """Later keys, keys that a mask hides, and what is added to a whole row."""
    allowed = torch.ones(6, 6, dtype=torch.bool).tril() & (torch.arange(6) != 1)
    allowed[1, 0] = True
    mask = allowed[None, None].expand(2, 1, 6, 6)
    mine, teacher = learning(seen(5, mask=mask)), seen(6, mask=mask)
    loss = map_loss(kind, [mine], [teacher], WANTED)
    loss.backward()
    assert (mine.key.grad[:, :, 1] == 0).all()
    assert (mine.query.grad[:, :, 5] == 0).all()
    added = mask.to(torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min).masked_fill(mask, 0.0)
    as_float = map_loss(kind, [seen(5, mask=added)], [seen(6, mask=added)], WANTED)
    torch.testing.assert_close(as_float, loss.detach())


@pytest.mark.parametrize("kind", [*MAPS, *ENTROPIES])
def test_sequences_count_alone_and_rows_in_parts(kind, monkeypatch):
    loss = map_loss if kind in MAPS else entropy_loss

    def one(each, row):
        return Seen(each.query[row : row + 1], each.key[row : row + 1], each.value[row : row + 1], None, None, None)

    pairs = [(seen(7), seen(8)), (seen(9), seen(10))]
    whole = loss(kind, [left for left, _ in pairs], [right for _, right in pairs], WANTED)
    parts = [
        loss(kind, [one(left, row) for left, _ in pairs], [one(right, row) for _, right in pairs], WANTED[row : row + 1])
        for row in range(2)
    ]
    torch.testing.assert_close(whole, sum(parts))
    monkeypatch.setattr("duramen.quantize.losses.ROWS", 2)
    torch.testing.assert_close(loss(kind, [left for left, _ in pairs], [right for _, right in pairs], WANTED), whole)


@pytest.mark.parametrize("kind", [*MAPS, *ENTROPIES])
def test_gradients_are_those_of_finite_differences(kind):
    loss = map_loss if kind in MAPS else entropy_loss
    mine, teacher = seen(11), seen(12)
    query, key, value = (each.clone().requires_grad_() for each in (mine.query, mine.key, mine.value))
    loss(kind, [Seen(query, key, value, None, None, None)], [teacher], WANTED).backward()
    generator = torch.Generator().manual_seed(0)
    for index, tensor in enumerate((query, key, value)):
        if tensor.grad is None:
            continue
        way = torch.randn(tensor.shape, generator=generator)
        ends = []
        for sign in (1, -1):
            moved = [mine.query, mine.key, mine.value]
            moved[index] = moved[index] + sign * 1e-2 * way
            ends.append(float(loss(kind, [Seen(*moved, None, None, None)], [teacher], WANTED)))
        assert float((tensor.grad * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.03, abs=3e-3)


def test_spreads_that_agree_cost_nothing_and_the_others_follow_their_formulas():
    teacher = seen(13)
    for kind in ("match", "gauss_kl"):
        assert float(entropy_loss(kind, [seen(13)], [teacher], WANTED)) == pytest.approx(0, abs=1e-5)
        assert float(entropy_loss(kind, [seen(14)], [teacher], WANTED)) > 0
    every = torch.ones(1, 6, dtype=torch.bool)
    mine = seen(15, batch=1)
    total = sum(float(torch.log1p(each.var(-1)).sum()) for each in (mine.query, mine.key))
    assert float(entropy_loss("code", [mine], [mine], every)) == pytest.approx(-6 * math.log(total), rel=1e-5)
    learning(mine)
    entropy_loss("code", [mine], [mine], every).backward()
    variance = mine.query.detach().var(-1, keepdim=True)
    expected = -6 / (total * (1 + variance)) * 2 * (mine.query - mine.query.mean(-1, keepdim=True)).detach() / 3
    torch.testing.assert_close(mine.query.grad, expected, rtol=1e-4, atol=1e-6)
    spreads = [each.detach().var((2, 3), correction=0) for each in (mine.query, mine.key)]
    printed = float(torch.log1p(spreads[0] * spreads[1].repeat_interleave(2, 1)).sum())
    assert float(entropy_loss("paper", [mine], [mine], every).detach()) == pytest.approx(-6 * math.log(printed), rel=1e-5)


def test_code_entropy_is_at_most_the_bits():
    assert code_entropy(torch.arange(16)) == pytest.approx(4)
    assert code_entropy(torch.zeros(9)) == 0
