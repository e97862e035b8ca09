"""Rounding to grids: the golden fixture, grids, steps, and what may never get worse."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.grids import Format, Grid, encode, pack, parse_format
from duramen.problem import Problem
from duramen.prune.factor import factorise
from duramen.prune.reconstruct import reconstruct
from duramen.quantize import gptq, rtn
from duramen.quantize.steps import choose_steps, of_every_weight
from test_golden import CHECKERED, GRAM, HESSIAN, WEIGHT, close, relative

DOUBLE = {"step_type": torch.float64}
NONE = torch.zeros_like(WEIGHT, dtype=torch.bool)


def rounded(function, grid, **more):
    return relative(function(WEIGHT, GRAM, grid=grid, step="absmax", **DOUBLE, **more).weight)


@pytest.mark.parametrize(
    ("bits", "nearest", "natural", "act", "refitted"),
    [
        (4, 0.0018045075, 0.0012113540, 0.0011354998, 0.0009610091),
        (3, 0.0107411209, 0.0085295533, 0.0052763421, 0.0055683507),
        (2, 0.0641990651, 0.0485031780, 0.0403720311, 0.0379457898),
    ],
)
def test_the_golden_fixture_by_rows(bits, nearest, natural, act, refitted):
    grid = Grid(bits)
    assert rounded(rtn.quantize, grid) == close(nearest)
    assert rounded(gptq.quantize, grid, order="natural", refine=0) == close(natural)
    assert rounded(gptq.quantize, grid, refine=0) == close(act)
    found = gptq.quantize(WEIGHT, GRAM, grid=grid, step="absmax", order="natural", refine=0, **DOUBLE).quantized
    steps = gptq.refit(found.codes.double(), WEIGHT, HESSIAN, found.steps)
    assert relative(pack(found.codes.double(), steps, None, grid).weight()) == close(refitted)


@pytest.mark.parametrize(
    ("bits", "from_act", "from_nearest"),
    [(4, 0.0011354998, 0.0011518444), (3, 0.0052600050, 0.0058353129), (2, 0.0394892077, 0.0394892077)],
)
def test_the_golden_fixture_after_descent(bits, from_act, from_nearest):
    grid = Grid(bits)
    for function, more, expected in ((gptq.quantize, {"refine": 0}, from_act), (rtn.quantize, {}, from_nearest)):
        found = function(WEIGHT, GRAM, grid=grid, step="absmax", **DOUBLE, **more).quantized
        step, zero = of_every_weight(found.steps, None, 12)
        codes = found.codes.double()
        for _ in range(20):
            codes = gptq.descend(codes, WEIGHT, HESSIAN, step, zero, grid, NONE)
        assert relative(codes * step) == close(expected)


@pytest.mark.parametrize(
    ("bits", "nearest", "static", "act", "refitted"),
    [
        (4, 0.0011961191, 0.0010539696, 0.0008213664, 0.0005537087),
        (3, 0.0087049337, 0.0074848468, 0.0049794367, 0.0045052132),
        (2, 0.0551945910, 0.0360186284, 0.0422550628, 0.0354118501),
    ],
)
def test_the_golden_fixture_by_groups(bits, nearest, static, act, refitted):
    grid = Grid(bits, 4)
    assert rounded(rtn.quantize, grid) == close(nearest)
    assert rounded(gptq.quantize, grid, order="natural", refine=0) == close(static)
    found = gptq.quantize(WEIGHT, GRAM, grid=grid, step="absmax", refine=0, **DOUBLE).quantized
    assert relative(found.weight()) == close(act)
    steps = gptq.refit(found.codes.double(), WEIGHT, HESSIAN, found.steps)
    assert relative(pack(found.codes.double(), steps, None, grid).weight()) == close(refitted)


@pytest.mark.parametrize(("bits", "expected"), [(4, 0.2292337928), (3, 0.2417950333)])
def test_after_pruning_both_losses_add_up_and_zeros_stay(bits, expected):
    exact = reconstruct(WEIGHT, GRAM, CHECKERED, damping=0.01).weight
    found = gptq.quantize(exact, GRAM, grid=Grid(bits), step="absmax", order="natural", refine=0, **DOUBLE)
    assert (found.weight[CHECKERED] == 0).all()
    assert torch.equal(found.pruned, CHECKERED)
    delta = found.weight - exact
    own = float(((delta @ HESSIAN) * delta).sum()) / float(((WEIGHT @ HESSIAN) * WEIGHT).sum())
    assert relative(found.weight) == close(expected)
    assert relative(found.weight) == pytest.approx(relative(exact) + own, abs=1e-12)
    refined = gptq.quantize(exact, GRAM, grid=Grid(bits), step="absmax", order="natural", **DOUBLE)
    assert relative(refined.weight) <= relative(found.weight)
    assert (refined.weight[CHECKERED] == 0).all()


def test_no_codes_are_better_than_the_best_of_all():
    """Two bits, every row on its own: 4^6 codes of half of the fixture."""
    weight, gram, grid = WEIGHT[:2, :6].contiguous(), GRAM[:6, :6].contiguous(), Grid(2)
    hessian = factorise(gram, 0.01, dtype=torch.float64).hessian
    found = gptq.quantize(weight, gram, grid=grid, step="absmax", refine=0, **DOUBLE)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)), dtype=torch.float64)
    for row, codes, step in zip(weight, found.quantized.codes.double(), found.quantized.steps, strict=True):
        delta = every * step - row
        best = ((delta @ hessian) * delta).sum(1).min()
        own = codes * step - row
        assert best <= own @ hessian @ own + 1e-12


matrices = st.tuples(st.integers(1, 9), st.sampled_from([8, 16, 24]), st.integers(0, 10_000))


def problem(outputs, inputs, seed):
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=draw, dtype=torch.float64) * torch.logspace(
        -1, 1, inputs, dtype=torch.float64
    )
    x = torch.randn(4 * inputs, inputs, generator=draw, dtype=torch.float64) @ mixed
    return torch.randn(outputs, inputs, generator=draw, dtype=torch.float64), x.T @ x


@settings(max_examples=30, deadline=None)
@given(matrices, st.sampled_from(["W2 g8", "W3 row", "W4 g8 affine", "W3 row affine", "W4 row narrow", "W3 tensor"]))
def test_refining_never_raises_the_loss_and_codes_stay_on_their_grid(shape, text):
    weight, gram = problem(*shape)
    grid, hessian = parse_format(text).weights, factorise(gram, 0.01, dtype=torch.float64).hessian

    def loss(found):
        delta = found.weight - weight
        return float(((delta @ hessian) * delta).sum())

    losses = [loss(gptq.quantize(weight, gram, grid=grid, refine=rounds, **DOUBLE)) for rounds in range(4)]
    assert all(after <= before * (1 + 1e-9) + 1e-12 for before, after in itertools.pairwise(losses))
    found = gptq.quantize(weight, gram, grid=grid, **DOUBLE).quantized
    assert grid.least <= int(found.codes.min()) <= int(found.codes.max()) <= grid.most
    assert (found.steps > 0).all()
    assert parse_format(Format(grid).text).weights == grid


@settings(max_examples=20, deadline=None)
@given(matrices)
def test_errors_of_columns_add_up_to_the_loss_and_without_correlation_rounding_is_to_nearest(shape):
    weight, gram = problem(*shape)
    grid, factor = Grid(4), factorise(gram, 0.01, dtype=torch.float64)
    steps, zeros = choose_steps(weight, grid, "absmax")
    step, zero = of_every_weight(steps, zeros, weight.shape[1])
    nowhere = torch.zeros_like(weight, dtype=torch.bool)
    codes = gptq.round_columns(weight, factor.upper, step, zero, grid, nowhere)
    delta, work, total = codes * step - weight, weight.clone(), 0.0
    for column in range(weight.shape[1]):
        error = (work[:, column] - codes[:, column] * step[:, column]) / factor.upper[column, column]
        work -= torch.outer(error, factor.upper[column])
        total += float(error.square().sum())
    assert total == pytest.approx(float(((delta @ factor.hessian) * delta).sum()), rel=1e-8)
    alone = factorise(gram.diagonal().diag(), 0.0, dtype=torch.float64)
    nearest = gptq.round_columns(weight, alone.upper, step, zero, grid, nowhere)
    assert torch.equal(nearest, encode(weight, steps, zeros, grid))


@pytest.mark.parametrize(("bits", "step", "error"), [(2, 1.0487, 0.14943), (3, 0.6018, 0.04064), (4, 0.3385, 0.01186)])
def test_the_chosen_step_of_normal_weights_is_the_known_one(bits, step, error):
    """The optimum for N(0, 1) by numeric integration (method sheet 2.2); four million weights share one step."""
    weight = torch.randn(2000, 2000, generator=torch.Generator().manual_seed(0))
    found, _ = choose_steps(weight, Grid(bits, "tensor"), "mse")
    back = encode(weight, found, None, Grid(bits, "tensor")) * found
    assert float((back - weight).square().mean()) == pytest.approx(error, rel=0.01)
    assert float(found[0, 0]) == pytest.approx(step, rel=0.05)


def test_what_is_on_the_grid_stays_and_zero_is_exact():
    weight, gram = problem(5, 16, 3)
    for text in ("W4 g8", "W3 row affine", "W8 row", "W8 g8 affine", "W2 tensor"):
        grid = parse_format(text).weights
        once = rtn.quantize(weight, gram, grid=grid, **DOUBLE)
        codes = encode(
            once.weight, once.quantized.steps, None if once.quantized.zeros is None else once.quantized.zeros.double(), grid
        )
        again = pack(codes, once.quantized.steps, None if once.quantized.zeros is None else once.quantized.zeros.double(), grid)
        assert torch.equal(again.codes, once.quantized.codes)
        zeros = weight.clone()
        zeros[:, ::2] = 0
        assert (rtn.quantize(zeros, gram, grid=grid, **DOUBLE).weight[:, ::2] == 0).all()
    nothing = rtn.quantize(torch.zeros(3, 16), gram.float(), grid=Grid(4))
    assert (nothing.weight == 0).all()
    assert (nothing.quantized.steps == 1).all()


def test_words_that_are_no_grid_and_groups_that_do_not_fit():
    for text in ("W9 row", "W1 row", "4 bits", "W4 g0", "W4 affine narrow", "W4 columns", ""):
        with pytest.raises(Problem, match="is no format"):
            parse_format(text)
    with pytest.raises(Problem, match="do not divide the 576 inputs") as caught:
        Grid(4, 128).width(576)
    assert "g64" in caught.value.fix
