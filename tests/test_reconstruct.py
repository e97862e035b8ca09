"""Exact reconstruction against slow references, its optimality conditions, and its certificate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from duramen.hardware import machine
from duramen.problem import Problem
from duramen.prune import reconstruct as module
from duramen.prune.factor import factorise
from duramen.prune.reconstruct import conjugate_gradients, reconstruct, target_weight
from oracles import dense

DAMPING = 0.01


def problem(inputs=24, outputs=6, seed=0, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = tiny.correlated(inputs, 4 * inputs, seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    pruned = torch.rand(outputs, inputs, generator=generator) < share
    return weight, x @ x.T, pruned, x


@given(st.integers(2, 32), st.integers(1, 8), st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_primal_dual_and_ours_agree(inputs, outputs, seed, share):
    weight, gram, pruned, _ = problem(inputs, outputs, seed, share)
    hessian = dense.damped(gram, DAMPING)
    ours = reconstruct(weight, gram, pruned, damping=DAMPING)
    primal, dual = dense.primal(weight, hessian, pruned), dense.dual(weight, hessian, pruned)
    scale = weight.abs().max()
    torch.testing.assert_close(ours.weight, primal, rtol=0, atol=1e-10 * scale.item() * 100)
    torch.testing.assert_close(primal, dual, rtol=0, atol=1e-8 * scale.item() * 100)
    assert (ours.weight[pruned] == 0).all()
    assert ours.error == pytest.approx(dense.loss(ours.weight - weight, gram), rel=1e-9, abs=1e-12)


def test_undamped_is_least_squares():
    weight, gram, pruned, x = problem(scale := 20)
    found = reconstruct(weight, gram, pruned, damping=0.0)
    torch.testing.assert_close(found.weight, dense.least_squares(weight, x, pruned), rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("seed", [0, 2])
def test_rounded_products_never_leave_a_row_worse_where_one_input_towers_above_the_rest(seed, monkeypatch):
    """Massive activations make the rounded Gram indefinite: a curvature came out negative, and the step infinite."""
    monkeypatch.setattr(machine, "_has_native_bfloat16", lambda: True)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 512, generator=generator)
    x = torch.randn(64, 64, generator=generator) @ x
    x[5] *= 300
    x += 0.05 * x[5] * torch.randn(64, 1, generator=generator)
    weight = torch.randn(128, 64, generator=generator)
    pruned = torch.rand(128, 64, generator=generator) < 0.5
    factor = factorise(x @ x.T, DAMPING)

    def losses(edited):
        change = (edited - weight).double()
        return (change @ factor.hessian.double() * change).sum(1)

    found = module.solve_iteratively(weight, factor, pruned, tolerance=1e-4, max_iterations=20, rough=True)
    before, after = losses(weight.masked_fill(pruned, 0)), losses(found.solution)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.1 * before.sum()


def test_optimality_conditions():
    weight, gram, pruned, _ = problem(32, 8)
    found = reconstruct(weight, gram, pruned, damping=DAMPING).weight
    gradient = (found - weight) @ dense.damped(gram, DAMPING)
    assert gradient[~pruned].abs().max() < 1e-9 * gram.abs().max()
    assert gradient[pruned].abs().max() > 1e-3, "the removed entries must carry the multipliers"


def test_scaling_the_gram_changes_nothing():
    weight, gram, pruned, _ = problem()
    torch.testing.assert_close(reconstruct(weight, gram, pruned).weight, reconstruct(weight, 1e4 * gram, pruned).weight)


def test_a_diagonal_gram_compensates_nothing():
    weight, gram, pruned, _ = problem()
    found = reconstruct(weight, torch.diag(gram.diagonal()), pruned).weight
    torch.testing.assert_close(found, weight.masked_fill(pruned, 0))


def test_rows_with_nothing_kept_or_nothing_pruned():
    weight, gram, pruned, _ = problem()
    pruned[0], pruned[1] = True, False
    found = reconstruct(weight, gram, pruned).weight
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], weight[1], rtol=0, atol=0)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.1])
def test_iterations_and_certificate(exponent, monkeypatch):
    """d = 256, power-law eigenvalues, log-normal columns, half pruned: certified 1e-4 in at most 40 iterations."""
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64))
    columns = torch.exp(0.5 * torch.randn(256, generator=generator, dtype=torch.float64))
    spectrum = torch.arange(1, 257, dtype=torch.float64) ** -exponent
    gram = columns[:, None] * (basis * spectrum @ basis.T) * columns
    weight = torch.randn(64, 256, generator=generator, dtype=torch.float64)
    pruned = torch.rand(64, 256, generator=generator) < 0.5
    direct = reconstruct(weight, gram, pruned, damping=0.001)
    assert direct.iterations == 0
    monkeypatch.setattr(module, "DIRECT_UP_TO", 0)
    found = reconstruct(weight, gram, pruned, damping=0.001)
    hessian = dense.damped(gram, 0.001)
    best, ours = dense.loss(direct.weight - weight, hessian), dense.loss(found.weight - weight, hessian)
    assert 0 < found.iterations <= 40
    assert found.excess <= 1e-4
    assert best <= ours * (1 + 1e-12)
    assert (ours - best) / ours <= found.excess


def test_the_bound_holds_at_every_step():
    weight, gram, pruned, _ = problem(48, 5, share=0.6)
    factor = factorise(gram, 0.001, dtype=torch.float64)
    support = (~pruned).double()
    start = weight * support
    residual = (weight @ factor.hessian) * support - (start @ factor.hessian) * support
    best = (
        (dense.primal(weight, factor.hessian, pruned) - weight)
        @ factor.hessian
        * (dense.primal(weight, factor.hessian, pruned) - weight)
    ).sum(1) / 2
    loss = ((start - weight) @ factor.hessian * (start - weight)).sum(1) / 2
    for steps in range(1, 12):
        found = conjugate_gradients(
            residual, factor.hessian, factor.inverse, support, loss=loss, tolerance=0.0, max_iterations=steps
        )
        now = start + found.solution
        left = (weight @ factor.hessian - now @ factor.hessian) * support
        rho = (left * (left @ factor.inverse)).sum(1)
        excess = ((now - weight) @ factor.hessian * (now - weight)).sum(1) / 2 - best
        assert (rho / 2 >= excess - 1e-12 * best).all(), f"half of rho must bound the excess after {steps} steps"
        assert (found.excess * (excess + best) >= excess - 1e-12 * best).all(), "and so must what the last step leaves of it"


def test_uncertified_rows_are_solved_directly(monkeypatch):
    weight, gram, pruned, _ = problem(64, 6)
    monkeypatch.setattr(module, "DIRECT_UP_TO", 0)
    found = reconstruct(weight, gram, pruned, damping=1e-6, max_iterations=2)
    torch.testing.assert_close(found.weight, dense.primal(weight, dense.damped(gram, 1e-6), pruned), rtol=1e-7, atol=1e-7)


def test_float32_is_near_float64(monkeypatch):
    weight, gram, pruned, _ = problem(96, 16)
    monkeypatch.setattr(module, "DIRECT_UP_TO", 0)
    single = reconstruct(weight.float(), gram.float(), pruned, damping=0.01, tolerance=1e-6)
    double = reconstruct(weight, gram, pruned, damping=0.01, tolerance=1e-6)
    hessian = dense.damped(gram, 0.01)
    ours, reference = dense.loss(single.weight.double() - weight, hessian), dense.loss(double.weight - weight, hessian)
    assert ours == pytest.approx(reference, rel=1e-4)


def test_dead_inputs_are_kept_and_compensate_nothing():
    weight, _, pruned, x = problem()
    x[3] = 0
    found = reconstruct(weight, x @ x.T, pruned)
    kept = ~pruned[:, 3]
    torch.testing.assert_close(found.weight[kept, 3], weight[kept, 3])


def test_no_token_at_all_is_magnitudes_business():
    factor = factorise(torch.zeros(5, 5, dtype=torch.float64), 0.01, dtype=torch.float64)
    torch.testing.assert_close(factor.hessian, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_asymmetric_target_is_stacked_least_squares(alpha):
    weight, _, pruned, dense_inputs = problem(12, 3)
    edited = dense_inputs + 0.3 * torch.randn(
        dense_inputs.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    gram, cross = edited @ edited.T, dense_inputs @ edited.T
    lam = 0.02 * gram.diagonal().mean()
    factor = factorise(gram, 0.02, dtype=torch.float64)
    shifted = target_weight(weight, gram, cross, alpha=alpha, factor=factor)
    ours = reconstruct(shifted, gram, pruned, damping=0.02).weight
    if alpha == 0:
        torch.testing.assert_close(shifted, weight)
    wanted = weight @ (alpha * dense_inputs + (1 - alpha) * edited)
    for row in range(len(weight)):
        kept = ~pruned[row]
        system = torch.cat([edited.T, lam.sqrt() * torch.eye(12, dtype=torch.float64)])[:, kept]
        right = torch.cat([wanted[row], lam.sqrt() * weight[row]])
        torch.testing.assert_close(ours[row, kept], torch.linalg.lstsq(system, right).solution, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("weight", "gram", "pruned", "words"),
    [
        (torch.ones(2, 3), torch.eye(4), torch.zeros(2, 3, dtype=torch.bool), "do not fit"),
        (torch.ones(2, 3), torch.eye(3), torch.zeros(2, 3), "must be bool"),
        (torch.ones(2, 3), torch.eye(3), torch.zeros(3, 2, dtype=torch.bool), "must be bool"),
        (torch.full((2, 3), torch.nan), torch.eye(3), torch.zeros(2, 3, dtype=torch.bool), "NaN"),
        (torch.ones(2, 3), torch.full((3, 3), torch.inf), torch.zeros(2, 3, dtype=torch.bool), "NaN or infinite"),
        (torch.ones(2, 3), -torch.eye(3), torch.zeros(2, 3, dtype=torch.bool), "not positive definite"),
    ],
)
def test_bad_input(weight, gram, pruned, words):
    with pytest.raises(Problem, match=words) as caught:
        reconstruct(weight, gram, pruned)
    assert caught.value.why
    assert caught.value.fix


def test_a_solve_that_is_cut_short_says_how_much_may_be_left(monkeypatch):
    weight, gram, pruned, _ = problem(64, 6)
    monkeypatch.setattr(module, "DIRECT_UP_TO", 0)
    hessian = dense.damped(gram, 0.01)
    best = dense.loss(dense.primal(weight, hessian, pruned) - weight, hessian)
    before = 1.0
    for steps in (1, 2, 4, 6):
        found = reconstruct(weight, gram, pruned, max_iterations=steps, tolerance=1e-9, complete=False)
        loss = dense.loss(found.weight - weight, hessian)
        assert found.iterations == steps
        assert (loss - best) / loss <= found.excess <= 1
        assert found.excess <= before
        before = found.excess


def test_no_iterations_at_all_means_a_direct_solve(monkeypatch):
    weight, gram, pruned, _ = problem(32, 4)
    monkeypatch.setattr(module, "DIRECT_UP_TO", 0)
    found = reconstruct(weight, gram, pruned, max_iterations=0)
    assert found.iterations == 0
    torch.testing.assert_close(found.weight, dense.primal(weight, dense.damped(gram, 0.01), pruned))
