"""Bias correction: the weight and the bias together are the least squares solution with an intercept."""

import pytest
import torch
from torch import nn

import tiny
from duramen.calibrate.statistics import Moments, Statistics
from duramen.families.model import Layer
from duramen.families.table import Projection
from duramen.prune import multiweight
from duramen.prune.layer import prepare, prune_layer
from duramen.prune.pruned import finish
from duramen.prune.reconstruct import reconstruct

OUTPUTS, INPUTS, TOKENS = 6, 12, 90
HALF = {"sparsity": 0.5, "pattern": None}


def inputs():
    """Dense and edited inputs with means far from zero, [I, N] each."""
    generator = torch.Generator().manual_seed(3)
    dense = tiny.correlated(INPUTS, TOKENS) + 2 * torch.randn(INPUTS, 1, generator=generator, dtype=torch.float64)
    return dense, dense + 0.3 * torch.randn(dense.shape, generator=generator, dtype=torch.float64) + 0.5


def layer(seed=1):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(INPUTS, OUTPUTS, dtype=torch.float64)
    stored = {
        "weight": torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64),
        "bias": torch.randn(OUTPUTS, generator=generator, dtype=torch.float64),
    }
    return Layer("layer", Projection("q", "layer"), 0, linear, stored)


def edit(prune, target, sums, settings):
    """Prunes one layer by half, as a stage of its own."""
    return prune_layer(prune, target, prepare(prune, [target], sums, settings, HALF), settings, HALF)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_weight_and_bias_are_least_squares_with_an_intercept(alpha):
    dense, edited = (x.float().double() for x in inputs())
    sums, target = Statistics(INPUTS, held_out=False, dense_inputs=INPUTS, device=torch.device("cpu")), layer()
    sums.update(edited.T, dense=dense.T)
    pruned = torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) < 0.5

    def prune(weight, gram, damping, **_):
        return finish(weight, reconstruct(weight, gram, pruned, damping=damping).weight, pruned, gram)

    record = edit(prune, target, sums, multiweight.Settings(sparsity=0.5, damping=0.02, dense_target=alpha))
    weight, bias = target.stored["weight"], target.stored["bias"]
    centred = edited - edited.mean(1, keepdim=True)
    pull = (0.02 * (centred @ centred.T).diagonal().mean()).sqrt() * torch.eye(INPUTS, dtype=torch.float64)
    wanted = weight @ (alpha * dense + (1 - alpha) * edited) + bias[:, None]
    for row in range(OUTPUTS):
        kept = ~pruned[row]
        ones = torch.cat([torch.ones(TOKENS, 1), torch.zeros(INPUTS, 1)]).double()
        system = torch.cat([torch.cat([edited.T, pull])[:, kept], ones], dim=1)
        solution = torch.linalg.lstsq(system, torch.cat([wanted[row], pull @ weight[row]])).solution
        torch.testing.assert_close(target.edited["layer.weight"][row, kept], solution[:-1], rtol=1e-4, atol=1e-4)
        assert float(target.edited["layer.bias"][row]) == pytest.approx(float(solution[-1]), rel=1e-4, abs=1e-4)
    change = target.edited["layer.weight"] @ edited + target.edited["layer.bias"][:, None] - weight @ dense - bias[:, None]
    assert record["dense_error"] == pytest.approx(float(change.square().sum() / (weight @ dense).square().sum()), rel=1e-3)
    own = (target.edited["layer.weight"] - weight) @ centred
    assert record["relative_error"] == pytest.approx(float(own.square().sum() / (weight @ edited).square().sum()), rel=1e-3)


def test_a_bias_that_is_corrected_never_hurts():
    _, edited = inputs()
    sums = Statistics(INPUTS, held_out=False, device=torch.device("cpu"))
    sums.update(edited.T)
    errors = {
        bias: edit(
            multiweight.prune, layer(), sums, multiweight.Settings(sparsity=0.5, damping=1e-4, mask="magnitude", bias=bias)
        )["relative_error"]
        for bias in ("auto", "off")
    }
    assert errors["auto"] < errors["off"]


def test_a_layer_without_bias_gets_none():
    bare = layer()
    del bare.stored["bias"]
    sums = Statistics(INPUTS, held_out=False, device=torch.device("cpu"))
    sums.update(inputs()[1].T)
    edit(multiweight.prune, bare, sums, multiweight.Settings(sparsity=0.5, damping=0.01))
    assert set(bare.edited) == {"layer.weight"}


def test_moments_about_any_mean():
    rows, mean = torch.randn(20, 4, dtype=torch.float64) + 1, torch.randn(4, dtype=torch.float64)
    sums = Moments(20, rows.sum(0), rows.T @ rows)
    torch.testing.assert_close(sums.about(mean), (rows - mean).T @ (rows - mean))
