"""Importance and fusion: oracles for gradients and saliences, the golden example, and what noise does."""

from itertools import pairwise

import pytest
import torch

import tiny
from duramen.calibrate.backward import walk_back
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.shrink import ablation
from duramen.shrink.fusion import Found, attention_weight, fuse, inverse_variance_weight, normalised
from duramen.shrink.groups import find_units
from duramen.shrink.importance import Estimates, Taylor, flap, slice_sums, wanda_sp
from duramen.shrink.plan import Plan

DOUBLE = torch.float64


def golden():
    n, u = torch.arange(4, dtype=DOUBLE)[:, None], torch.arange(6, dtype=DOUBLE)[None]
    coarse = 1.5 + 0.6 * torch.cos(0.4 * u) + 0.5 * torch.sin(1.1 * n + 0.7 * u**2)
    return coarse, 2 + torch.cos(0.5 * u) + 0.8 * torch.sin(2 * n + u)


def test_golden_shares():
    coarse, fine = golden()
    assert attention_weight(coarse, fine) == pytest.approx(0.3015371293, abs=1e-9)
    assert attention_weight(coarse, fine, 0.5) == pytest.approx(0.4580990589, abs=1e-9)
    shares = torch.tensor([0.71842439, 0.61092578, 0.70722598, 0.78185544, 0.68275533, 0.80335034], dtype=DOUBLE)
    torch.testing.assert_close(inverse_variance_weight(coarse, fine), shares, rtol=0, atol=1e-7)
    fused = torch.tensor([1.31486874, 1.31026534, 1.13980978, 0.98291769, 0.71498951, 0.53714892], dtype=DOUBLE)
    found = fuse(coarse.mean(0), fine.mean(0), attention_weight(coarse, fine))
    torch.testing.assert_close(found, fused, rtol=0, atol=1e-7)


def test_fusion_reduces_to_its_parts():
    coarse, fine = (table.mean(0) for table in golden())
    assert torch.equal(fuse(coarse, fine, 1.0), normalised(coarse))
    assert torch.equal(fuse(coarse, fine, 0.0), normalised(fine))
    table, _ = golden()
    assert attention_weight(table, table) == pytest.approx(0.5, abs=1e-15)
    assert attention_weight(table[:1], table[:1]) == 0.5


def test_shares_do_not_depend_on_scale():
    coarse, fine = golden()
    scales = torch.tensor([[0.1], [3.0], [20.0], [1.0]], dtype=DOUBLE)
    assert attention_weight(coarse * scales, fine / scales) == pytest.approx(attention_weight(coarse, fine), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_noise_drives_the_share_to_zero(seed):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.distributions.Gamma(2.0, 1.0)
    torch.manual_seed(seed)
    truth = truth.sample((64,))
    noise, other = (torch.randn(16, 64, generator=generator) for _ in range(2))
    fine = truth * torch.exp(0.3 * other)
    shares = [attention_weight(truth * torch.exp(sigma * noise), fine) for sigma in (0, 0.3, 0.6, 1, 2, 4)]
    assert all(later < earlier for earlier, later in pairwise(shares)), shares
    assert shares[0] > 0.6
    assert shares[-1] < 0.05


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "bloom", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("disk", [False, True])
def test_streamed_gradients_equal_those_of_the_whole(name, disk, tmp_path):
    network, tokens = tiny.model(name), tiny.ids(3, 12)
    model = BlockModel.from_folder(tiny.save(name, tmp_path)) if disk else BlockModel.from_module(network)
    paths = {member.path for units in find_units(model, ("ffn_channel", "kv_group")) for member in units.members}
    seen = {}

    class Observer:
        def paths(self, block):
            return [path for path in paths if path in dict(model.blocks[block].named_parameters())]

        def see(self, block, path, weight, gradient, sequence):
            seen[block, path, sequence] = gradient.clone()

        def finish(self, block):
            assert all(parameter.grad is None for parameter in model.network.parameters())

    walk = Walk(activation_memory=0 if disk else 2**30)  # with 0 all hidden states go over the disk
    losses = walk_back(model, tokens, Observer(), walk=walk)
    for sequence in range(3):
        whole = tiny.model(name)
        loss = whole(tokens[sequence : sequence + 1], labels=tokens[sequence : sequence + 1]).loss
        loss.backward()
        assert losses[sequence] == pytest.approx(loss.item(), rel=1e-5)
        blocks = whole.get_submodule(model.family.blocks)
        for (block, path, number), gradient in seen.items():
            if number == sequence:
                torch.testing.assert_close(gradient, blocks[block].get_parameter(path).grad, rtol=1e-3, atol=1e-6)


def scores(network, tokens, **settings):
    """Taylor scores by (block, kind), and the observer's own tables of signed slice sums."""
    model, found = BlockModel.from_module(network), {}
    units = find_units(model, ("ffn_channel", "kv_group"))
    options = {"order": "second", "coarse": "per_sequence"} | settings
    keep = lambda each, estimates: found.__setitem__((each.block, each.kind), estimates)  # noqa: E731
    taylor = Taylor(units, len(tokens), tokens.shape[1] - 1, give=keep, **options)
    walk_back(model, tokens, taylor, walk=Walk())
    return found


def gradients(name, tokens):
    """Parameter -> gradient of every sequence, [N, ...], from the whole model."""
    rows = []
    for sequence in tokens:
        network = tiny.model(name)
        network(sequence[None], labels=sequence[None]).loss.backward()
        rows.append({path: parameter.grad for path, parameter in network.named_parameters()})
    return {path: torch.stack([row[path] for row in rows]) for path in rows[0]}


def test_scores_against_their_formulas():
    tokens, network = tiny.ids(3, 12), tiny.model("llama")
    g, t = gradients("llama", tokens), 11
    start = "model.layers.1.mlp."
    w = {name: network.get_parameter(f"{start}{name}_proj.weight") for name in ("gate", "up", "down")}
    g = {name: g[f"{start}{name}_proj.weight"] for name in w}
    turned = {"gate": lambda x: x, "up": lambda x: x, "down": lambda x: x.movedim(-1, -2)}
    product = {name: turned[name](w[name] * g[name]) for name in w}
    key = (1, "ffn_channel")
    found = scores(network, tokens)[key]
    coarse = sum(values.sum(2).abs() for values in product.values())
    fine = sum(0.5 * t * values.square().sum(2) for values in product.values())
    torch.testing.assert_close(found.coarse_table, coarse, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.fine, fine.mean(0), rtol=1e-3, atol=1e-6)
    assert bool(
        (found.coarse <= scores(network, tokens, order="first", coarse="per_sequence")[key].fine_table.mean(0) + 1e-6).all()
    )
    for order in ("first", "mix"):
        batch = scores(network, tokens, order=order, coarse="batch")[key]
        q = {name: turned[name](g[name].square().mean(0) * w[name].square()) for name in w}
        phi = {name: product[name].mean(0) - (0.5 * t * q[name] if order == "mix" else 0) for name in w}
        torch.testing.assert_close(batch.coarse, sum(x.sum(1).abs() for x in phi.values()), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(batch.fine, sum(x.abs().sum(1) for x in phi.values()), rtol=1e-3, atol=1e-6)
        assert bool((batch.coarse <= batch.fine + 1e-6).all())
    fisher = scores(network, tokens, coarse="mask_fisher")[key]
    torch.testing.assert_close(fisher.coarse_table, 0.5 * t * product["down"].sum(2).square(), rtol=1e-3, atol=1e-6)


def test_rescaling_identities():
    """Signed sums of an up row and a down column are both the derivative to a factor on the channel; a gate row's is not."""
    tokens = tiny.ids(1, 12)
    network, start = tiny.model("llama").double(), "model.layers.1."
    network(tokens, labels=tokens).loss.backward()
    signed = {}
    for name, axis in (("mlp.gate", 0), ("mlp.up", 0), ("mlp.down", 1), ("self_attn.v", 0), ("self_attn.o", 1)):
        parameter = network.get_parameter(f"{start}{name}_proj.weight")
        signed[name.split(".")[1]] = slice_sums(parameter.detach() * parameter.grad, axis)[0]
    torch.testing.assert_close(signed["up"], signed["down"], rtol=1e-9, atol=1e-14)
    assert (signed["gate"] - signed["down"]).abs().max() > 1e-4
    heads = signed["o"].reshape(2, 2, 8).sum(1).flatten()  # [KV group, query head, dim]
    torch.testing.assert_close(signed["v"], heads, rtol=1e-9, atol=1e-14)


def test_taylor_of_second_order_is_exact_for_a_quadratic():
    """A linear layer with a squared loss: φ with the exact Hessian diagonal is the loss of removing one weight."""
    x, y, w = torch.randn(5, 20, dtype=DOUBLE), torch.randn(3, 20, dtype=DOUBLE), torch.randn(3, 5, dtype=DOUBLE)
    loss = lambda weight: 0.5 * (weight @ x - y).square().sum()  # noqa: E731
    gradient, hessian = (w @ x - y) @ x.T, (x @ x.T).diagonal()
    salience = gradient * w - 0.5 * hessian * w.square()
    for o in range(3):
        for i in range(5):
            without = w.clone()
            without[o, i] = 0
            assert float(loss(w) - loss(without)) == pytest.approx(float(salience[o, i]), abs=1e-9)


def test_the_fisher_term_needs_the_number_of_tokens():
    """With independent tokens, T·q from means over T tokens is the mean of the squared gradients of single ones."""
    generator = torch.Generator().manual_seed(0)
    single = torch.randn(400, 16, 64, generator=generator)  # [sequences, T, weights], mean zero
    q = single.mean(1).square().mean(0)
    ratio = 16 * q.mean() / single.square().mean()
    assert 0.8 < ratio < 1.2
    assert q.mean() / single.square().mean() < 0.1


def test_scores_from_activations():
    weight, x = torch.randn(4, 6), torch.randn(6, 50)
    assert torch.allclose(wanda_sp(weight, (x @ x.T).diagonal()), weight.abs().mean(0) * x.norm(dim=1), atol=1e-5)
    assert torch.allclose(flap(weight, x.var(1, correction=0)), x.var(1, correction=0) * weight.norm(dim=0) ** 2, atol=1e-5)


def test_measured_losses():
    """Each trial alone, run side by side, costs what the masked model costs."""
    network, tokens = tiny.model("llama"), tiny.ids(2, 16)
    model = BlockModel.from_module(network)
    units = find_units(model, ("ffn_channel", "kv_group"))
    trials = [(units[0], [3, 5, 9]), (units[1], [1]), (units[4], list(range(24)))]
    rises = ablation.loss_rises(model, trials, tokens, walk=Walk(activation_memory=0))
    whole = Plan("", 3)
    for number, (each, gone) in enumerate(trials):
        kept = {
            each.kind: tuple(tuple(sorted(set(range(each.count)) - set(gone if b == each.block else ()))) for b in range(3))
        }
        losses = ablation.masked_losses(model, [whole, Plan("", 3, kept)], tokens).mean(1)
        assert float(rises[number]) == pytest.approx(float(losses[1] - losses[0]), abs=1e-5)


def test_fitted_share():
    coarse, fine = torch.tensor([1.0, 2.0, 4.0, 7.0]), torch.tensor([2.0, 1.0, 5.0, 3.0])
    assert ablation.fit_share(coarse, fine, 2 * coarse, (1.0, 1.0)) == pytest.approx(1.0, abs=1e-6)
    assert ablation.fit_share(coarse, fine, 3 * fine, (1.0, 1.0)) == pytest.approx(0.0, abs=1e-6)
    assert ablation.fit_share(coarse, fine, coarse + fine, (1.0, 3.0)) == pytest.approx(0.25, abs=1e-6)
    assert ablation.fit_share(coarse, fine, -coarse, (1.0, 1.0)) == 0.5
    assert ablation.fit_share(coarse, fine, coarse - 0.1 * fine, (1.0, 1.0)) == 1.0
    assert ablation.strata(torch.tensor([5.0, 1.0, 3.0]), 8) == [[1], [2], [0]]


def test_gradients_that_are_not_finite_are_named():
    network = tiny.model("llama")
    model = BlockModel.from_module(network)
    tokens = tiny.ids(2, 12)

    def spoil(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    network.model.layers[1].mlp.down_proj.register_forward_hook(spoil)
    taylor = Taylor(find_units(model, ("ffn_channel",)), 2, 11, order="second", coarse="batch", give=lambda *_: None)
    with pytest.raises(Problem, match=r"gradient of model.layers.1.mlp.down_proj.weight is not finite in sequence 0") as caught:
        walk_back(model, tokens, taylor, walk=Walk())
    assert "float32" in caught.value.fix


def test_sequences_of_one_token():
    model = BlockModel.from_module(tiny.model("llama"))
    taylor = Taylor(find_units(model, ("ffn_channel",)), 2, 0, order="second", coarse="batch", give=lambda *_: None)
    with pytest.raises(Problem, match="no next token"):
        walk_back(model, tiny.ids(2, 1), taylor, walk=Walk())


def test_found_scores_are_the_fused_ones_at_the_scale_of_the_fine():
    """Unit by unit, too, where each has a share of its own."""
    units = find_units(BlockModel.of(tiny.model("llama")), ("ffn_channel",))[0]
    tables = [table.float() for table in golden()]
    coarse, fine = (table.mean(0) for table in tables)
    for weight in (0.3, torch.linspace(0.1, 0.9, len(coarse))):
        found, fused = Found(units, Estimates(7 * coarse, fine, *tables), weight).fused(), fuse(coarse, fine, weight)
        torch.testing.assert_close(found / found.mean(), fused / fused.mean())
        assert float(found.mean()) == pytest.approx(float(fine.mean()))
