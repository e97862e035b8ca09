"""Rows of four and eight bits: the sheet's figures, the best set by trying all, whole numbers bit for bit."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.problem import Problem
from duramen.quantize.rows import FOUR, MixedRows, choose_rows, code_product, integer_product, mix_rows, row_gain
from oracles import dense
from test_golden import HESSIAN, WEIGHT, WHOLE


def error(mixed, weight, gram):
    return float(dense.loss(mixed.weight() - weight, gram))


def test_the_gains_and_losses_of_the_sheet():
    gain = row_gain(WEIGHT, HESSIAN, step="absmax")
    assert gain.tolist() == pytest.approx([0.0320303499, 0.0757584957, 0.0774354061, 0.0264434922], abs=1e-9)
    for rows, expected in enumerate((0.0018045075, 0.0011478357, 0.0005053845, 0.0002337590, 0.0000095115)):
        mixed = mix_rows(WEIGHT, HESSIAN, rows / 4, step="absmax")
        assert int(mixed.eight.sum()) == rows
        assert error(mixed, WEIGHT, HESSIAN) / WHOLE == pytest.approx(expected, abs=1e-9)
        assert mixed.bits == 4 + rows


@pytest.mark.parametrize("step", ["absmax", "weighted"])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_no_other_set_of_rows_is_better(step, count):
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(7, 10, generator=generator, dtype=torch.float64) * torch.rand(
        7, 1, generator=generator, dtype=torch.float64
    )
    inputs = torch.randn(10, 40, generator=generator, dtype=torch.float64)
    gram = inputs @ inputs.T
    four, eight = (mix_rows(weight, gram, share, step=step) for share in (0.0, 1.0))
    assert bool(eight.eight.all())
    found = mix_rows(weight, gram, count / 7, step=step)
    errors = []
    for rows in itertools.combinations(range(7), count):
        chosen = torch.zeros(7, dtype=torch.bool)
        chosen[list(rows)] = True
        codes = torch.where(chosen[:, None], eight.codes, four.codes)
        errors.append(error(MixedRows(codes, torch.where(chosen, eight.steps, four.steps), chosen), weight, gram))
    assert error(found, weight, gram) == pytest.approx(min(errors), rel=1e-12)
    assert error(eight, weight, gram) <= error(found, weight, gram) <= error(four, weight, gram)


def test_rows_that_would_lose_stay_and_ties_go_in_order():
    assert choose_rows(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.5).tolist() == [False, True, True, False]
    assert choose_rows(torch.tensor([2.0, 2.0, 2.0, 2.0]), 0.5).tolist() == [True, True, False, False]
    assert choose_rows(torch.tensor([-1.0, 0.0, 1.0, -2.0]), 1.0).tolist() == [False, False, True, False]
    steps = torch.rand(3, 1, dtype=torch.float64) + 0.5
    weight = torch.randint(-7, 8, (3, 16)).double() * steps
    weight[:, 0] = 7 * steps[:, 0]
    mixed = mix_rows(weight, torch.eye(16, dtype=torch.float64), 1.0, step="absmax")
    assert not mixed.eight.any(), "they lie on a grid of four bits"
    torch.testing.assert_close(mixed.weight(), weight)
    for wrong in (-0.1, 1.5):
        with pytest.raises(Problem, match="is no share of rows"):
            choose_rows(torch.ones(3), wrong)


@given(st.integers(1, 12), st.integers(1, 600), st.sampled_from([4, 6, 8]), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_products_of_codes_are_those_of_whole_numbers(outputs, width, bits, share):
    generator = torch.Generator().manual_seed(outputs * width)
    weight = torch.randn(outputs, width, generator=generator)
    mixed = mix_rows(weight, torch.eye(width), share)
    inputs = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, width), generator=generator, dtype=torch.int8)
    inputs[0], bias = inputs.min(), torch.randn(outputs, generator=generator)
    whole = integer_product(mixed, inputs, 0.037, bias)
    assert torch.equal(code_product(mixed, inputs, 0.037, bias), whole)
    assert torch.allclose((inputs.float() * 0.037) @ mixed.weight().T + bias, whole, rtol=1e-4, atol=1e-4)
    assert int(mixed.codes[~mixed.eight].abs().max()) <= -FOUR.least if (~mixed.eight).any() else True


def test_where_float32_does_not_count_exactly_it_is_refused():
    mixed = mix_rows(torch.randn(2, 2048), torch.eye(2048), 1.0)
    with pytest.raises(Problem, match="are not exact in float32"):
        code_product(mixed, torch.full((1, 2048), -128, dtype=torch.int8), 1.0)
