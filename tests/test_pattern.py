"""Exact counts, ties, N:M groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.problem import Problem
from duramen.prune import magnitude, multiweight, sparsegpt, wanda
from duramen.prune.pattern import keep_existing_zeros, kth_lowest, lowest, parse_pattern, select

PRUNERS = {"magnitude": magnitude.prune, "wanda": wanda.prune, "sparsegpt": sparsegpt.prune, "multiweight": multiweight.prune}


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0, 0.999), st.integers(0, 3), st.sampled_from(["row", "layer"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_counts_are_exact_whatever_the_ties(rows, columns, share, levels, scope):
    scores = torch.randint(0, levels + 1, (rows, columns)).float()
    target = parse_pattern(share)
    pruned = select(scores, target, scope=scope)
    assert int(pruned.sum()) == target.total(rows, columns, scope)
    if scope == "row":
        assert (pruned.sum(1) == round(share * columns)).all()
    kept, gone = scores[~pruned], scores[pruned]
    if scope == "layer" and len(kept) and len(gone):
        assert gone.max() <= kept.min()


def test_ties_go_by_ascending_index():
    assert lowest(torch.zeros(1, 6), 3)[0].tolist() == [True] * 3 + [False] * 3
    assert lowest(torch.tensor([[2.0, 1, 1, 0, 1]]), 3)[0].tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.0},
        {"sparsity": 0.37},
        {"sparsity": 0.5},
        {"pattern": "2:4"},
        {"pattern": "1:4"},
        {"pattern": "3:4"},
        {"pattern": "4:8"},
    ],
)
@pytest.mark.parametrize("constant", [False, True])
def test_every_pruner_removes_exactly_what_was_asked(name, settings, constant):
    inputs, outputs = 42, 7
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(inputs, 200, generator=generator)
    weight = torch.ones(outputs, inputs) if constant else torch.randn(outputs, inputs, generator=generator)
    found = PRUNERS[name](weight, x @ x.T, **settings)
    target = parse_pattern(**settings)
    assert int(found.pruned.sum()) == target.total(outputs, inputs, "row" if name == "wanda" else "layer")
    assert (found.weight[found.pruned] == 0).all()
    assert found.weight.dtype == weight.dtype
    if target.grouped:
        whole = inputs - inputs % target.group
        groups = found.pruned[:, :whole].reshape(outputs, -1, target.group).sum(2)
        assert (groups == target.group - target.kept).all()
        assert not found.pruned[:, whole:].any(), "columns after the last whole group stay dense"
    if settings.get("sparsity") == 0:
        torch.testing.assert_close(found.weight, weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", PRUNERS)
def test_zeros_stay_zero_and_bfloat16_stays_exact(name):
    weight = torch.randn(8, 64).bfloat16()
    weight[torch.rand(8, 64) < 0.3] = 0
    x = torch.randn(64, 300)
    found = PRUNERS[name](weight, x @ x.T, sparsity=0.5)
    assert found.weight.dtype == torch.bfloat16
    assert int(found.pruned.sum()) == 256
    assert (found.weight[weight == 0] == 0).all() or name in ("sparsegpt", "multiweight")
    if name in ("magnitude", "wanda"):
        assert found.pruned[weight == 0].float().mean() > 0.9


def test_a_target_below_the_present_sparsity_is_refused():
    weight = torch.zeros(4, 8)
    weight[:, 0] = 1
    with pytest.raises(Problem, match=r"87\.50% zero already, the target is 50"):
        keep_existing_zeros(weight.abs(), weight, parse_pattern(0.5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.2}, "`sparsity: 0.012`"), ({"sparsity": 50.0}, r"`sparsity: 0.5` if you meant 50 percent"), ({"sparsity": -0.1}, "at least 0"),
        ({"sparsity": 1.0}, "below 1"), ({"pattern": "4:2"}, '"2:4" keeps 2 of 4'), ({"pattern": "0:4"}, "kept:group"),
        ({"pattern": "4:4"}, "kept:group"), ({"pattern": "half"}, "kept:group"), ({}, "exactly one"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one"),
    ],
)  # fmt: skip
def test_bad_targets(settings, words):
    with pytest.raises(Problem, match=words):
        parse_pattern(**settings)


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "sorted", "periodic", "infinite"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.999])
def test_bracketed_ranks_are_exact(kind, share):
    size = 60_000
    values = {
        "normal": torch.randn(size),
        "ties": torch.randint(0, 5, (size,)).float(),
        "constant": torch.ones(size),
        "sorted": torch.arange(size).float(),
        "periodic": torch.arange(size).remainder(7).float(),
        "infinite": torch.randn(size).masked_fill(torch.rand(size) < 0.4, torch.inf),
    }[kind]
    count = round(share * size)
    assert float(kth_lowest(values, count)) == float(values.sort().values[count - 1])
    assert int(lowest(values[None], count).sum()) == count
