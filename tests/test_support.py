"""Masks that are searched for: exact counts, orderings that must hold, and how near they come to the enumerated optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from duramen.hardware import machine
from duramen.prune import multiweight, sparsegpt
from duramen.prune.factor import factorise
from duramen.prune.pattern import Sparse, parse_pattern
from duramen.prune.reconstruct import reconstruct
from duramen.prune.support import admm, curvature, rounds, swap
from oracles import dense

TARGETS = ({"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "1:4"}, {"pattern": "4:8"})
EFFORTS = ("fast", "good", "best")


def layer(outputs, inputs, seed):
    x = tiny.correlated(inputs, 5 * inputs, seed)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weight, x @ x.T / x.shape[1]


def damped_loss(weight, edited, gram):
    return dense.loss(edited - weight, dense.damped(gram, 0.01))


def conforms(pruned, target):
    whole = pruned.shape[1] - pruned.shape[1] % target.group
    groups = pruned[:, :whole].reshape(-1, target.group).sum(1)
    return bool((groups == target.group - target.kept).all()) and not pruned[:, whole:].any()


cases = given(
    outputs=st.integers(1, 12), inputs=st.integers(8, 40), seed=st.integers(0, 99), where=st.sampled_from(TARGETS),
    effort=st.sampled_from(EFFORTS),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@cases
def test_counts_are_exact_and_groups_conform(outputs, inputs, seed, where, effort):
    weight, gram = layer(outputs, inputs, seed)
    found, target = multiweight.prune(weight, gram, effort=effort, **where), parse_pattern(**where)
    assert int(found.pruned.sum()) == target.total(outputs, inputs)
    assert not target.grouped or conforms(found.pruned, target)
    assert (found.weight[found.pruned] == 0).all()


@settings(max_examples=40, deadline=None)
@cases
def test_the_error_is_never_above_that_of_plain_zeroing(outputs, inputs, seed, where, effort):
    weight, gram = layer(outputs, inputs, seed)
    found = multiweight.prune(weight, gram, effort=effort, **where)
    zeroed = damped_loss(weight, weight.masked_fill(found.pruned, 0), gram)
    assert damped_loss(weight, found.weight, gram) <= zeroed * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@cases
def test_never_above_sparsegpt_at_its_own_mask(outputs, inputs, seed, where, effort):
    weight, gram = layer(outputs, inputs, seed)
    greedy = sparsegpt.prune(weight, gram, **where)
    solved = reconstruct(weight, gram, greedy.pruned, damping=0.01)
    bettered = multiweight.prune(weight, gram, mask="sparsegpt", refine="swap", **where)
    limit = damped_loss(weight, greedy.weight, gram) * (1 + 1e-9)
    assert (
        damped_loss(weight, bettered.weight, gram)
        <= damped_loss(weight, solved.weight, gram) * (1 + 1e-9)
        <= limit * (1 + 1e-9)
    )


@settings(max_examples=30, deadline=None)
@cases
def test_rows_may_come_in_any_order(outputs, inputs, seed, where, effort):
    weight, gram = layer(outputs, inputs, seed)
    order = torch.randperm(outputs, generator=torch.Generator().manual_seed(seed))
    one, other = (multiweight.prune(w, gram, effort=effort, **where) for w in (weight, weight[order]))
    if parse_pattern(**where).grouped or effort != "fast":
        assert torch.equal(one.pruned[order], other.pruned)
        torch.testing.assert_close(one.weight[order], other.weight)


@settings(max_examples=30, deadline=None)
@cases
def test_pruning_again_changes_nothing(outputs, inputs, seed, where, effort):
    weight, gram = layer(outputs, inputs, seed)
    once = multiweight.prune(weight, gram, effort=effort, **where)
    again = multiweight.prune(once.weight, gram, effort=effort, **where)
    assert torch.equal(once.pruned, again.pruned)
    torch.testing.assert_close(once.weight, again.weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("where", TARGETS)
@pytest.mark.parametrize("seed", range(3))
def test_exchanges_only_lower_the_loss(where, seed):
    weight, gram = layer(24, 48, seed)
    factor, target = factorise(gram, 0.01, dtype=torch.float64), parse_pattern(**where)
    for found in (admm(weight, factor, target), rounds(weight, factor, target), sparsegpt.prune(weight, gram, **where)):
        mask, better = found.pruned, swap(weight, factor, Sparse(found.weight, found.pruned), target).pruned
        assert torch.equal(better.sum(1), mask.sum(1))
        assert not target.grouped or conforms(better, target)
        before, after = (
            (
                (dense.primal(weight, factor.hessian, m) - weight)
                @ factor.hessian
                * (dense.primal(weight, factor.hessian, m) - weight)
            ).sum(1)
            for m in (mask, better)
        )
        assert (after <= before * (1 + 2e-3)).all(), "no row may lose more than the tolerance of the rough solves"
        assert after.sum() < before.sum()


def test_near_the_enumerated_optimum():
    """Width 12, 924 masks a row: exchanges come within a tenth of the best masks of 20 rows, from a poor start too."""
    weight, gram = layer(20, 12, 0)
    hessian, masks = dense.damped(gram, 0.01), dense.all_masks(12, 6)
    factor, target = factorise(gram, 0.01, dtype=torch.float64), parse_pattern(0.5)
    best = sum(dense.best_mask(row, hessian, masks)[1] for row in weight)
    poor = torch.arange(12).remainder(2).bool().expand(20, 12)
    found = swap(weight, factor, Sparse(weight.masked_fill(poor, 0), poor), target).pruned
    assert best <= damped_loss(weight, dense.primal(weight, hessian, found), gram) <= 1.1 * best
    assert damped_loss(weight, dense.primal(weight, hessian, poor), gram) > 2 * best


def test_curvatures_are_those_of_the_rows():
    _, gram = layer(6, 10, 0)
    factor = factorise(gram, 0.01, dtype=torch.float64)
    pruned = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    kept, removed = [[[] for _ in range(10)] for _ in range(2)]
    for mask in pruned:
        stay = (~mask).nonzero()[:, 0].tolist()
        inverse = torch.linalg.inv(factor.hessian[stay][:, stay])
        for place, j in enumerate(stay):
            kept[j].append(float(inverse[place, place]))
        for p in mask.nonzero()[:, 0].tolist():
            with_p = torch.linalg.inv(factor.hessian[[*stay, p]][:, [*stay, p]])
            removed[p].append(1 / float(with_p[-1, -1]))
    found = curvature(factor, pruned)
    for values, ours in ((kept, found.kept), (removed, found.removed)):
        for column in range(10):
            if values[column]:
                assert float(ours[column]) == pytest.approx(float(torch.tensor(values[column]).log().mean().exp()), rel=1e-6)


def test_mean_error_order_of_the_efforts():
    """In practice, on the mean over layers: SparseGPT > fast > good > best."""
    totals = dict.fromkeys(("sparsegpt", *EFFORTS), 0.0)
    for seed in range(6):
        weight, gram = layer(48, 96, seed)
        totals["sparsegpt"] += sparsegpt.prune(weight, gram, sparsity=0.6).error
        for effort in EFFORTS:
            totals[effort] += multiweight.prune(weight, gram, sparsity=0.6, effort=effort).error
    assert totals["sparsegpt"] > totals["fast"] > totals["good"] > totals["best"]


@pytest.mark.parametrize("where", TARGETS)
@pytest.mark.parametrize("effort", ["fast", "good"])
def test_rounded_products_cost_next_to_nothing(where, effort, monkeypatch):
    """bfloat16 where only a direction is needed: the same loss to 1 %, and exact zeros and counts as ever."""
    monkeypatch.setattr("duramen.prune.reconstruct.DIRECT_UP_TO", 0)
    weight, gram = (part.float() for part in layer(32, 192, 0))
    losses = []
    for native in (False, True):
        monkeypatch.setattr(machine, "_has_native_bfloat16", lambda native=native: native)
        found = multiweight.prune(weight, gram, effort=effort, **where)
        assert int(found.pruned.sum()) == parse_pattern(**where).total(32, 192, "layer")
        losses.append(float(damped_loss(weight.double(), found.weight.double(), gram.double())))
    assert losses[1] != losses[0], "the two ways must differ, or nothing was tested"
    assert losses[1] <= 1.01 * losses[0]


def test_rounding_spares_float64():
    left, right = (torch.randn(5, 5, dtype=torch.float64) for _ in range(2))
    assert torch.equal(machine.rough_product(left, right), left @ right)
