"""Token reduction against brute force: scores, matching, merging, and schedules."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.problem import Problem
from duramen.tokens.compact import Kept, reduce, staying
from duramen.tokens.match import match
from duramen.tokens.model import Reduction
from duramen.tokens.schedule import Costs, counted_tokens, kept_count, published_sites, solve_keep, token_fraction
from duramen.tokens.score import importance


def brute(scores, features, count, protected, valid, forward, window, into_protected):
    """The pairs as they are defined, token by token."""
    eligible = [t for t in range(len(scores)) if valid[t] and not protected[t]]
    a = sorted(sorted(eligible, key=lambda t: (float(scores[t]), t))[: len(eligible) // 2])
    b = [t for t in range(len(scores)) if valid[t] and t not in a and (into_protected or not protected[t])]
    found = []
    for i in a:
        may = [j for j in b if (not forward or j > i) and (window is None or abs(i - j) <= window)]
        if may:
            cosine = {j: float(torch.nn.functional.cosine_similarity(features[i], features[j], dim=0)) for j in may}
            best = max(may, key=lambda j: (cosine[j], -j))
            found.append((-cosine[best], i, best))
    return [(i, j) for _, i, j in sorted(found)[:count]]


@given(
    length=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    count=st.integers(0, 8),
    forward=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    into_protected=st.booleans(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_pairs_are_those_of_the_definition(length, seed, count, forward, window, into_protected):
    draw = torch.Generator().manual_seed(seed)
    scores, features = torch.rand(length, generator=draw), torch.randn(length, 4, generator=draw)
    protected, valid = (torch.rand(length, generator=draw) < share for share in (0.2, 0.85))
    found = match(
        scores, features, count, protected=protected, valid=valid, forward=forward, window=window, into_protected=into_protected
    )
    expected = brute(scores, features, count, protected, valid, forward, window, into_protected)
    assert list(zip(found.source.tolist(), found.target.tolist(), strict=True)) == expected
    assert (found.similarity.diff() <= 0).all()
    scaled = match(
        scores,
        7 * features,
        count,
        protected=protected,
        valid=valid,
        forward=forward,
        window=window,
        into_protected=into_protected,
    )
    assert torch.equal(scaled.source, found.source)


def test_blocks_of_rows_change_nothing(monkeypatch):
    scores, features = torch.rand(100), torch.randn(100, 8)
    whole = match(scores, features, 30)
    monkeypatch.setattr("duramen.tokens.match.ROWS", 7)
    parts = match(scores, features, 30)
    assert torch.equal(whole.source, parts.source)
    assert torch.equal(whole.target, parts.target)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), share=st.sampled_from([0.0, 0.5, 1.0]), weighted=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_merged_tokens_are_means_and_the_others_as_they_were(seed, count, share, weighted):
    draw = torch.Generator().manual_seed(seed)
    scores, values = torch.rand(11, generator=draw), torch.randn(11, 3, generator=draw)
    sizes = torch.randint(1, 4, (11,), generator=draw).float() if weighted else None
    pairs = match(scores, values, count)
    found = reduce(values, pairs, prune_share=share, sizes=sizes)
    pruned = round(share * len(pairs.source))
    groups = {t: [t] for t in range(11) if t not in pairs.source.tolist()}
    for i, j in list(zip(pairs.source.tolist(), pairs.target.tolist(), strict=True))[pruned:]:
        groups[j].append(i)
    weights = torch.ones(11) if sizes is None else sizes
    for slot, (token, group) in enumerate(sorted(groups.items())):
        expected = (values[group] * weights[group, None]).sum(0) / weights[group].sum()
        if len(group) == 1:
            assert torch.equal(found[slot], values[token])
        torch.testing.assert_close(found[slot], expected)
    if share == 0 and weighted:
        kept = Kept(torch.arange(11), sizes, torch.arange(11)).without(pairs)
        torch.testing.assert_close((found * kept.sizes[:, None]).sum(0), (values * sizes[:, None]).sum(0))


def test_places_sizes_and_representatives_follow_through_several_sites():
    torch.manual_seed(3)
    kept, values = Kept.all_of(20), torch.randn(20, 4)
    stands_for = {token: token for token in range(20)}
    for _ in range(3):
        pairs = match(torch.rand(len(kept.positions)), values, 4)
        before = kept.positions.tolist()
        for i, j in zip(pairs.source.tolist(), pairs.target.tolist(), strict=True):
            stands_for = {token: before[j] if at == before[i] else at for token, at in stands_for.items()}
        values, kept = reduce(values, pairs), kept.without(pairs)
        assert kept.positions.tolist() == sorted(set(stands_for.values()))
        assert kept.positions[kept.representative].tolist() == [stands_for[token] for token in range(20)]
        assert kept.sizes.tolist() == [list(stands_for.values()).count(at) for at in kept.positions.tolist()]
        assert len(values) == len(kept.positions)


def test_scores_are_their_formulas():
    draw = torch.Generator().manual_seed(0)
    y, steps, x, b = (torch.randn(shape, generator=draw) for shape in ((2, 3, 4, 5), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 6)))
    steps = steps.abs()
    found = {
        kind: importance(kind, outputs=y, write_steps=steps, inputs=x, b=b)
        for kind in ("delta", "write", "clip", "l1", "l2", "sum")
    }
    for row, token in itertools.product(range(2), range(3)):
        flat = y[row, token].flatten()
        expected = {
            "delta": steps[row, token].square().sum().sqrt(),
            "write": sum(steps[row, token, h] * x[row, token, h].norm() * b[row, token, h // 2].norm() for h in range(4)),
            "clip": flat[flat > 0].sum() / 20, "l1": flat.abs().sum(), "l2": flat.norm(), "sum": flat.sum(),
        }  # fmt: skip
        for kind, value in expected.items():
            torch.testing.assert_close(found[kind][row, token], value)
    flat = importance("write", outputs=y, write_steps=steps, inputs=x[..., 0], b=b[:, :, 0])
    torch.testing.assert_close(flat, (steps * x[..., 0].abs()).sum(-1) * b[:, :, 0].norm(dim=-1))
    drawn = importance("random", outputs=y, write_steps=steps, inputs=x, b=b, seed=1)
    assert drawn.shape == (2, 3)


def test_the_published_schedules():
    """The table of the method sheet: keep ratios for 10, 20 and 30 % fewer tokens, and what is left at the end."""
    for layers, keeps, left in (
        (64, (0.9729, 0.9415, 0.9043), (0.825, 0.656, 0.495)),
        (48, (0.9651, 0.9248, 0.8768), (0.808, 0.626, 0.454)),
    ):
        sites = published_sites(layers)
        assert sites == list(range(12, 43, 5)) if layers == 64 else list(range(10, 36, 5))
        for cut, keep, end in zip((0.1, 0.2, 0.3), keeps, left, strict=True):
            found = solve_keep(counted_tokens(layers), sites, cut)
            assert found == pytest.approx(keep, abs=1e-3)
            assert found ** len(sites) == pytest.approx(end, abs=2e-3)
            assert token_fraction(layers, dict.fromkeys(sites, found)) == pytest.approx(1 - cut, abs=1e-9)
    assert 1 - token_fraction(64, dict.fromkeys(published_sites(64), 0.905)) == pytest.approx(0.2984, abs=1e-4)
    assert token_fraction(4, {1: 0.5, 2: 0.25}) == pytest.approx((1 + 1 + 0.5 + 0.125) / 4)
    assert kept_count(100, 0.55) == 55
    assert kept_count(52, 0.7) == math.ceil(36.4)
    with pytest.raises(Problem, match="cannot be cut"):
        solve_keep(counted_tokens(48), [40], 0.5)
    with pytest.raises(Problem, match="after the layers none"):
        solve_keep(counted_tokens(48), [], 0.1)


def test_one_patch_stays_and_no_more_is_promised():
    costs = Costs([float] * 4, stays=1, whole=True)
    assert [kept_count(*each) for each in ((5, 1e-12), (1, 0.2), (0, 0.5), (10, 0.1))] == [1, 1, 0, 1]
    most = 1 - (17 + 2 * 3) / (17 * 4)
    for cut in (most, most - 1e-9, 0.5):
        keep = solve_keep(costs, [0], cut, tokens=17)
        assert 0 < keep < 1
        assert costs.total(17, {0: keep}) <= (1 - cut) * costs.total(17, {}) + 1e-9
        assert costs.total(17, {0: keep + 1 / 16}) > (1 - cut) * costs.total(17, {})
    with pytest.raises(Problem, match="67% of the tokens cannot be cut") as caught:
        solve_keep(costs, [0], 0.67, tokens=17)
    assert "at most 66.1% can be cut" in caught.value.why


def test_no_more_is_promised_than_pairs_can_merge():
    assert solve_keep(counted_tokens(4), [1], 0.25, least=0.5) == 0.5
    assert solve_keep(counted_tokens(4), [1], 0.26) == pytest.approx(0.48)
    with pytest.raises(Problem, match="26% of the tokens cannot be cut") as caught:
        solve_keep(counted_tokens(4), [1], 0.26, least=0.5)
    assert "at most half" in caught.value.why
    assert "at most 25%" in caught.value.why
    for kind in ("utrc", "tome"):
        with pytest.raises(ValueError, match="at most half"):
            Reduction(kind=kind, sites=(0, 1), keep=(0.8, 0.4))
    assert Reduction(kind="prune", sites=(0,), keep=(0.4,)).keep == (0.4,)


def test_sorting_every_channel_over_time_would_thin_the_beginning():
    """Why the released rule is not ours: channels sorted one by one make rows ranks, and what leaves are the first even tokens."""
    draw = torch.Generator().manual_seed(0)
    noise, features = torch.randn(1000, 512, generator=draw), torch.zeros(1000, 512)
    for t in range(1000):
        features[t] = 0.9 * features[t - 1] + noise[t] if t else noise[t]
    features = features.clamp_min(0)
    unit = torch.nn.functional.normalize(features, dim=-1).sort(0, descending=True).values
    cosines = unit[500:] @ unit[:500].T
    best = cosines.max(1)
    released = {2 * int(i) for i in best.values.topk(95).indices}
    assert released == set(range(0, 190, 2))
    ours = match(features.mean(-1), features, 95)
    assert len(set(ours.source.tolist()) & released) < 40
    assert staying(1000, ours).sum() == 905
