"""Adapters: scales and their exact equivalences, gradients, merges that keep zeros, orderings on one layer, resizing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
from duramen.problem import Problem
from duramen.prune.factor import factorise
from duramen.recover.adapters import Adapter, masked_linear, principal_factors, side_linear, spp_linear, spp_weight
from duramen.recover.merge import check_outputs, check_zeros, resize, weighted_svd
from duramen.recover.refit import distance, refit
from duramen.recover.scaling import coupled_rate, first_step_decrease, scale


def test_rules_agree_where_they_must():
    for alpha, rank in ((16.0, 8), (3.5, 1), (64.0, 32)):
        assert scale(alpha, rank) == pytest.approx(scale(alpha * math.sqrt(rank), rank, "alpha_over_r"))
    assert scale(5, 1) == scale(5, 1, "alpha_over_r") == scale(5, 1, "constant") == 5
    assert coupled_rate(3e-4, scale(16, 16), 16) == pytest.approx(3e-4), "the default is the published setting's γ·r"
    assert coupled_rate(3e-4, scale(16, 64), 64) == pytest.approx(1.5e-4), "under RoRA and AdamW the rate goes as 1/√r"


@pytest.mark.parametrize(
    ("optimizer", "expected"), [("sgd", {"alpha_over_r": -1.0, "alpha_over_sqrt_r": 0.0, "constant": 1.0}), ("adamw", {"alpha_over_r": 0.0, "alpha_over_sqrt_r": 0.5, "constant": 1.0})]
)  # fmt: skip
def test_the_first_step_grows_with_rank_as_derived(optimizer, expected):
    generator, ranks = torch.Generator().manual_seed(0), (4, 8, 16, 32, 64, 128, 256)
    gradient = torch.randn(256, 512, generator=generator)
    for rule, slope in expected.items():
        logs = [
            math.log(
                sum(
                    first_step_decrease(
                        gradient, torch.randn(rank, 512, generator=generator), scale(16, rank, rule), optimizer=optimizer
                    )
                    for _ in range(20)
                )
            )
            for rank in ranks
        ]
        x = torch.tensor([math.log(rank) for rank in ranks])
        y = torch.tensor(logs)
        found = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        assert found == pytest.approx(slope, abs=0.05)


def test_rora_is_lora_with_a_faster_b_under_adam():
    """Fifty steps in float64 with ε near zero: RoRA at η is LoRA(α/r) at η for A and √r·η for B."""
    generator = torch.Generator().manual_seed(1)
    x, wanted = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (24, 10))
    rank, alpha, rate = 16, 16.0, 1e-3
    start = torch.randn(rank, 24, generator=generator, dtype=torch.float64)

    def train(gamma, rate_b):
        a, b = start.clone().requires_grad_(), torch.zeros(10, rank, dtype=torch.float64, requires_grad=True)
        groups = [{"params": [a], "lr": rate}, {"params": [b], "lr": rate_b}]
        optimizer = torch.optim.AdamW(groups, eps=1e-30, weight_decay=0.0)
        for _ in range(50):
            optimizer.zero_grad()
            (gamma * (x @ a.T) @ b.T - wanted).square().mean().backward()
            optimizer.step()
        return (gamma * b @ a).detach()

    rora = train(scale(alpha, rank), rate)
    lora = train(scale(alpha, rank, "alpha_over_r"), math.sqrt(rank) * rate)
    assert float((rora - lora).abs().max()) < 1e-12
    assert float(rora.abs().max()) > 1e-3


def layer(seed=0, outputs=6, inputs=8, rank=3, kind=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=kind)  # noqa: E731
    kept = torch.rand(outputs, inputs, generator=generator) < 0.5
    return draw(2, 5, inputs), draw(outputs, inputs).masked_fill(~kept, 0), kept, draw(rank, inputs), draw(outputs, rank)


def test_gradients_of_all_forms():
    x, weight, kept, a, b = layer()
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: masked_linear(x, weight, kept, a, b, 0.7), (x, a, b))
    start = torch.randn_like(a), torch.randn_like(b)
    assert torch.autograd.gradcheck(lambda x, a, b: masked_linear(x, weight, kept, a, b, 0.7, start), (x, a, b))
    assert torch.autograd.gradcheck(lambda x, a, b: side_linear(x, weight, a, b, 0.7), (x, a, b))
    beta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, beta: spp_linear(x, weight, a, beta, 2.0), (x, a, beta))
    torch.testing.assert_close(spp_linear(x, weight, a, beta, 2.0), x @ spp_weight(weight, a, beta, 2.0).T)


@pytest.mark.parametrize(
    ("mode", "start"), [("side", "zero"), ("masked", "zero"), ("spp", "zero"), ("side", "pissa"), ("masked", "pissa")]
)
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_at_first_nothing_changes_and_merged_is_unmerged(mode, start, lengths, transposed):
    x, weight, kept, a, b = layer(2, kind=torch.float32)
    base = nn.Linear(6, 8) if transposed else nn.Linear(8, 6)
    base.weight.data = (weight.T if transposed else weight).contiguous()
    base.bias = nn.Parameter(torch.randn(6))
    adapter = Adapter(
        base,
        rank=3,
        gamma=0.5,
        mode=mode,
        kept=kept if mode != "side" else None,
        lengths=lengths,
        transposed=transposed,
        start=start,
    )
    assert (adapter.b != 0).any() == (start == "pissa")
    expected = nn.functional.linear(x, weight, base.bias)
    torch.testing.assert_close(adapter(x), expected)
    with torch.no_grad():
        adapter.a.copy_(a)
        adapter.b.copy_(b[:, 0] if mode == "spp" else b)
        if lengths:
            adapter.length.mul_(1.5)
    assert not torch.allclose(adapter(x), expected)
    found = adapter.merged()
    assert check_outputs("layer", found, base.bias, x.flatten(0, 1), adapter(x).detach().flatten(0, 1), tolerance=1e-5) < 1e-5
    assert (found[~kept] == 0).all() == (mode != "side")
    with pytest.raises(Problem, match="changes its outputs"):
        check_outputs("layer", 1.1 * found, base.bias, x.flatten(0, 1), adapter(x).detach().flatten(0, 1), tolerance=1e-5)
    assert {name for name, parameter in adapter.named_parameters() if parameter.requires_grad} == {
        "a",
        "b",
        *(("length",) if lengths else ()),
    }


def test_the_principal_start_is_the_truncated_decomposition():
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)) @ torch.diag(0.7 ** torch.arange(24.0))
    u, s, v = torch.linalg.svd(weight)
    before = torch.random.get_rng_state()
    a, b = principal_factors(weight, 5, 0.3, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(0.3 * b @ a, (u[:, :5] * s[:5]) @ v[:5], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-3, atol=1e-4)  # the same share on both sides


@given(
    st.sampled_from([(1, 4), (2, 4), (4, 8)]),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_merge_keeps_every_zero_of_every_pattern(pattern, seed, kind):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 4 * m, generator=generator)
    kept = (
        torch.zeros(5, 4, m, dtype=torch.bool)
        .scatter_(2, weight.reshape(5, 4, m).abs().topk(n, dim=2).indices, True)
        .reshape(5, -1)
    )
    base = nn.Linear(4 * m, 5, bias=False).to(kind)
    base.weight.data = weight.masked_fill(~kept, 0).to(kind)
    adapter = Adapter(base, rank=2, gamma=1.0, mode="masked", kept=kept, generator=generator)
    with torch.no_grad():
        adapter.b.normal_(generator=generator)
    found = adapter.merged()
    check_zeros("layer", found, kept)
    assert (found[~kept] == 0).all()
    assert ((found != 0).reshape(5, 4, m).sum(2) <= n).all()


def test_a_dense_change_of_a_sparse_weight_is_refused():
    _, weight, kept, _, b = layer(3, kind=torch.float32)
    base = nn.Linear(8, 6, bias=False)
    base.weight.data = weight
    adapter = Adapter(base, rank=3, gamma=0.5, mode="side", kept=kept)
    with torch.no_grad():
        adapter.b.copy_(b)
    with pytest.raises(Problem, match="would fill") as caught:
        check_zeros("model.layers.0.mlp.up_proj", adapter.merged(), kept)
    assert "masked" in caught.value.fix


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_resizing_loses_only_the_singular_values_left_out(rank):
    _, _, _, a, b = layer(4)
    new_a, new_b = resize(a, b, 0.7, rank=rank, new_gamma=0.3)
    values = torch.linalg.svdvals(0.7 * b @ a)
    error = float((0.3 * new_b @ new_a - 0.7 * b @ a).norm())
    assert error == pytest.approx(float(values[rank:].square().sum().sqrt()), abs=1e-10)
    assert (new_a.shape, new_b.shape) == ((rank, 8), (6, rank))
    with pytest.raises(Problem, match="rank of 0"):
        resize(a, b, 0.7, rank=0, new_gamma=0.3)


def test_the_weighted_svd_is_the_best_change_of_its_rank():
    generator = torch.Generator().manual_seed(5)
    x = tiny.correlated(16, 200)
    error = torch.randn(10, 16, generator=generator, dtype=torch.float64)
    root = torch.linalg.cholesky(x @ x.T)
    values = torch.linalg.svdvals(error @ root)
    for rank in (1, 4, 8):
        b, a = weighted_svd(error, x @ x.T, rank)
        assert float(((error - b @ a) @ x).square().sum()) == pytest.approx(float(values[rank:].square().sum()), rel=1e-8)


def test_orderings_on_one_layer():
    """Refit ≤ masked at a quarter of the rank < SPP < masked after training < pruned; and there, more rank is worse."""
    torch.manual_seed(0)
    x = tiny.correlated(64, 1024, scale=0.5).float()
    dense = torch.randn(64, 64) / 8
    gram = (x @ x.T).double()
    kept = (
        torch.zeros(64, 16, 4, dtype=torch.bool)
        .scatter_(2, dense.reshape(64, 16, 4).abs().topk(2, dim=2).indices, True)
        .reshape(64, 64)
    )
    pruned = dense.masked_fill(~kept, 0)

    def error(weight):
        return distance(weight, dense, gram, gram) + float(((dense.double() @ gram) * dense.double()).sum())

    def trained(mode, rank, steps=600):
        base = nn.Linear(64, 64, bias=False)
        base.weight.data = pruned.clone()
        gamma = 1.0 if mode != "spp" else 2.0
        adapter = Adapter(
            base,
            rank=rank,
            gamma=gamma,
            mode=mode,
            kept=kept if mode == "masked" else None,
            generator=torch.Generator().manual_seed(1),
        )
        optimizer = torch.optim.Adam([adapter.a, adapter.b], lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        inputs, wanted = x.T, x.T @ dense.T
        for _ in range(steps):
            optimizer.zero_grad()
            (adapter(inputs) - wanted).square().mean().backward()
            optimizer.step()
            schedule.step()
        return adapter.merged()

    exact = error(refit(pruned, dense, gram, ~kept, factorise(gram, 1e-6)))
    masked, spp = error(trained("masked", 16)), error(trained("spp", 16))
    after_8, after_32 = (error(trained("side", rank).masked_fill(~kept, 0)) for rank in (4, 16))
    assert exact <= masked <= 1.05 * exact
    assert masked < spp < min(after_8, after_32)
    assert max(after_8, after_32) < error(pruned)
    assert after_32 > after_8
