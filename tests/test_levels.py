"""Nested orders and levels against the golden fixture, brute force, and per-level solves."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from duramen.prune.factor import factorise
from duramen.prune.reconstruct import reconstruct
from duramen.search.levels import columns_of, error_curve, greedy_order, level_factor, level_weight, removal_losses
from oracles import dense
from test_golden import GRAM, HESSIAN, INPUTS, WEIGHT, close, exact, relative

INVERSE = torch.linalg.inv(HESSIAN)


def columns_removed(units, size=1, weight=WEIGHT):
    pruned = torch.zeros(weight.shape, dtype=torch.bool)
    pruned[:, columns_of(list(units), size)] = True
    return pruned


def test_the_golden_greedy_order():
    order, rises = greedy_order(WEIGHT, INVERSE)
    assert order[::-1][:6] == [9, 7, 6, 0, 10, 4]
    assert order == [5, 11, 2, 8, 1, 3, 4, 10, 0, 6, 7, 9]
    assert exact(columns_removed(order[6:])) == close(0.0369370394)
    assert 2 * float(rises[6:].sum()) / dense.loss(WEIGHT, HESSIAN) == close(0.0369370394), "the rises must telescope"


@pytest.mark.parametrize(
    ("per_round", "kept", "expected"),
    [(3, {1, 2, 3, 5, 8, 11}, 0.0369370394), (2, {1, 2, 4, 5, 8, 11}, 0.0417811939), (6, {0, 1, 2, 3, 5, 11}, 0.1207737942)],
)
def test_golden_rounds(per_round, kept, expected):
    order, _ = greedy_order(WEIGHT, INVERSE, per_round=per_round)
    assert set(order[:6]) == kept
    assert exact(columns_removed(order[6:])) == close(expected)


def test_golden_heads_leave_one_by_one():
    one_by_one, _ = greedy_order(WEIGHT, INVERSE, size=3)
    assert one_by_one[::-1][:2] == [3, 0]
    assert exact(columns_removed(one_by_one[2:], 3)) == close(0.1349582324)
    pairs = {pair: exact(columns_removed(pair, 3)) for pair in combinations(range(4), 2)}
    assert min(pairs, key=pairs.get) == (0, 3)
    together, _ = greedy_order(WEIGHT, INVERSE, size=3, per_round=2)
    assert together[::-1][:2] == [3, 1]
    assert exact(columns_removed(together[2:], 3)) == close(0.3447331135) == max(pairs.values())


def test_the_golden_error_curve_is_a_suffix_sum():
    order, _ = greedy_order(WEIGHT, INVERSE)
    energy, lower = level_factor(WEIGHT, HESSIAN, torch.tensor(order))
    curve = error_curve(energy) / dense.loss(WEIGHT, HESSIAN)
    expected = {10: 0.0016345032, 9: 0.0039987112, 8: 0.0138358238, 6: 0.0369370394, 3: 0.1698341263, 1: 0.5268861692}
    assert {kept: float(curve[kept]) for kept in expected} == pytest.approx(expected, abs=1e-9)
    assert (curve.diff() <= 0).all()
    assert curve[INPUTS] == 0
    for kept in range(1, INPUTS + 1):
        edited = torch.zeros_like(WEIGHT)
        edited[:, order[:kept]] = level_weight(energy, lower, kept)
        solved = reconstruct(WEIGHT, GRAM, columns_removed(order[kept:]), damping=0.01).weight
        torch.testing.assert_close(edited, solved, rtol=1e-9, atol=1e-11)
        assert relative(edited) == close(float(curve[kept]))


@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_removal_losses_are_what_removing_costs(size, units, outputs, seed):
    inputs = size * units
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = tiny.correlated(inputs, 4 * inputs, seed)
    hessian = dense.damped(x @ x.T, 0.01)
    losses = removal_losses(weight, torch.linalg.inv(hessian), size)
    for unit in range(units):
        pruned = columns_removed([unit], size, weight)
        solved = dense.primal(weight, hessian, pruned)
        assert float(losses[unit]) == pytest.approx(0.5 * dense.loss(solved - weight, hessian), rel=1e-8, abs=1e-10)


@given(st.integers(2, 10), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_order_is_greedy_and_the_best_where_units_do_not_interact(units, seed):
    weight = torch.randn(3, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    diagonal = torch.rand(units, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) + 0.1
    order, _ = greedy_order(weight, torch.diag(1 / diagonal))
    assert order == (weight.square().sum(0) * diagonal).argsort(descending=True).tolist()
    x = tiny.correlated(units, 4 * units, seed)
    factor = factorise(x @ x.T, 0.01, dtype=torch.float64)
    order, _ = greedy_order(weight, factor.inverse)
    first = removal_losses(weight, factor.inverse, 1)
    assert order[-1] == int(first.argmin())
    energy, _ = level_factor(weight, factor.hessian, torch.tensor(order))
    optimum = min(
        dense.loss(dense.primal(weight, factor.hessian, columns_removed(gone, 1, weight)) - weight, factor.hessian)
        for gone in combinations(range(units), units // 2)
    )
    assert float(error_curve(energy)[units - units // 2]) >= optimum * (1 - 1e-9)
