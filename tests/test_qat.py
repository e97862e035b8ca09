"""Quantization-aware training: the gradients of learned steps, a start that loses nothing, what is saved, and what cannot be."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import duramen
import tiny
from duramen.calibrate.walker import Walk
from duramen.grids import Grid, parse_format
from duramen.problem import Problem
from duramen.quantize import qat
from duramen.quantize.learned import LearnedLinear, on_grid
from duramen.quantize.steps import choose_steps
from duramen.registry import get_method
from duramen.rundir import CODES, FORMATS, MASKS, read_codes, unpack_mask
from test_quantize import recipe

FAST = {"steps": 6, "every": 3, "batch": 4, "learning_rate": 1e-3}


@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(4, "row"), Grid(2, 8, affine=True), Grid(3, "tensor", narrow=True)])
def test_gradients_are_those_of_learned_steps(grid):
    """Against the closed form, and against differences of the function with what is rounded off held fixed."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    steps, zeros = choose_steps(weight, grid, "mse")
    alone = steps[:1, :1].clone().requires_grad_() if grid.share == "tensor" else steps.clone().requires_grad_()
    latent, upstream = weight.clone().requires_grad_(), torch.randn(5, 8, generator=generator, dtype=torch.float64)
    (on_grid(latent, alone.expand(5, -1), zeros, grid) * upstream).sum().backward()
    zero = torch.zeros_like(steps) if zeros is None else zeros
    scaled = weight.view(*steps.shape, -1) / steps[..., None]
    low, high = grid.least - zero[..., None], grid.most - zero[..., None]
    inside, codes = (scaled >= low) & (scaled <= high), scaled.round().clamp(low, high)
    assert torch.equal(latent.grad, (upstream.view_as(scaled) * inside).view_as(weight))
    by_step = (upstream.view_as(scaled) * torch.where(inside, codes - scaled, codes)).sum(-1)
    shared = 40 if grid.share == "tensor" else scaled.shape[-1]
    by_step = by_step.sum().view(1, 1) if grid.share == "tensor" else by_step
    torch.testing.assert_close(alone.grad, by_step / (shared * grid.most) ** 0.5)

    residue = torch.where(inside, codes - scaled, torch.zeros_like(scaled))

    def surrogate(w, a):
        v = w.view(*steps.shape, -1) / a[..., None]
        return ((v + residue).where(inside, codes) * a[..., None] * upstream.view_as(scaled)).sum()

    way_w, way_a = (
        torch.randn(5, 8, generator=generator, dtype=torch.float64),
        torch.randn(steps.shape, generator=generator, dtype=torch.float64),
    )
    if grid.share == "tensor":
        way_a = way_a[:1, :1].expand_as(steps)
    change = (surrogate(weight + 1e-6 * way_w, steps) - surrogate(weight - 1e-6 * way_w, steps)) / 2e-6
    assert float((latent.grad * way_w).sum()) == pytest.approx(float(change), rel=1e-6, abs=1e-8)
    change = (surrogate(weight, steps + 1e-6 * way_a) - surrogate(weight, steps - 1e-6 * way_a)) / 2e-6
    moved = (alone.grad * (shared * grid.most) ** 0.5 * (way_a[:1, :1] if grid.share == "tensor" else way_a)).sum()
    assert float(moved) == pytest.approx(float(change), rel=1e-5, abs=1e-8)


def test_a_learned_step_finds_the_least_error():
    weight = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    layer = LearnedLinear(
        torch.nn.Linear(4000, 1),
        weight,
        (weight.abs().amax().view(1, 1) / 7, None),
        grid=Grid(4),
        step_type=torch.float32,
        pruned=None,
    )
    optimizer = torch.optim.Adam([layer.log_steps], lr=0.02)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        optimizer.zero_grad()
        (layer.weight() - weight).square().mean().backward()
        optimizer.step()
    steps = torch.linspace(0.2, 0.5, 601)
    errors = [float((on_grid(weight, step.view(1, 1), None, Grid(4)) - weight).square().mean()) for step in steps]
    assert float(layer.steps().detach()) == pytest.approx(float(steps[min(range(601), key=errors.__getitem__)]), rel=0.02)


def _check_shown(maps):
    """Rows of a map sum to one and look back; the dense model's stand apart from both of the student's."""
    dense, before, after = (torch.tensor(maps[who]) for who in ("dense", "before", "after"))
    for each in (dense, before, after):
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:2]), atol=0.02, rtol=0)
        assert not each.triu(1).any()
    assert (after - dense).square().sum() != (before - dense).square().sum() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bamba"])
def test_it_brings_a_rounded_model_nearer_and_leaves_it_on_the_grid(name):
    """gpt2 stores its weights [I, O], and has biases."""
    network, tokens, walk = tiny.model(name), tiny.ids(48, 24), Walk()
    records = get_method("qat").apply(
        network, tokens, walk=walk, format="W3A8KV8 g8", **FAST | {"steps": 30, "step_rate": 3e-3}
    )
    first, *_, last = walk.training["terms"]
    assert min(loss for _, loss in walk.training["held_out"]) < 0.98 * walk.training["held_out"][0][1]
    assert set(first) == {"likelihood", "divergence", "maps"}
    assert last["maps"] < first["maps"]
    _check_shown(walk.training["maps"])
    assert all(0 < record["code_entropy"] <= 3 for record in records)
    assert not any(isinstance(module, LearnedLinear) for module in network.modules())
    for record in records:
        weight = network.get_parameter(record["layer"] + ".weight")
        weight = weight.T if name == "gpt2" else weight
        assert all(len(part.unique()) <= 8 for part in weight.reshape(-1, 8)[:50])


def test_it_starts_from_what_was_rounded_and_stays_there_if_nothing_is_better(llama, texts, tmp_path, monkeypatch):
    """With a learning rate of nearly nothing the codes are those of the step before."""
    steps = [{"method": "gptq", "format": "W4A8KV8 g8"}, {"method": "qat", **FAST, "learning_rate": 1e-12, "step_rate": 0.0}]
    found = duramen.run(recipe(texts, *steps), str(llama), tmp_path / "out")
    duramen.run(recipe(texts, steps[0]), str(llama), tmp_path / "before")
    left, right = read_codes(tmp_path / "out"), read_codes(tmp_path / "before")
    assert left.keys() == right.keys()
    for name, each in left.items():
        assert torch.equal(each.codes, right[name].codes)
        assert torch.equal(each.steps, right[name].steps)
    assert (tmp_path / "out" / FORMATS).read_bytes() == (tmp_path / "before" / FORMATS).read_bytes()
    assert found["steps"][1]["training"]["distilled"]
    assert any((each.codes == 0).float().mean() > 0.06 for each in left.values())
    assert all(layer["removed"] == 0 for layer in found["steps"][1]["layers"]), "codes that are zero are no mask"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Its maps" in page
    assert page.count('<img class="map"') == 9


def test_prune_round_train_keeps_every_zero_and_every_code(llama, texts, tmp_path):
    steps = [
        {"method": "multiweight", "pattern": "2:4", "effort": "fast"},
        {"method": "gptq", "format": "W4A8 g8"},
        {"method": "qat", **FAST, "entropy_loss": "match"},
    ]
    found = duramen.run(recipe(texts, *steps), str(llama), tmp_path / "out")
    masks, codes = load_file(tmp_path / "out" / MASKS), read_codes(tmp_path / "out")
    for name, packed in masks.items():
        assert (codes[name].codes[unpack_mask(packed, codes[name].codes.shape[1])] == 0).all()
    inspected = duramen.inspect(str(tmp_path / "out"))
    assert inspected["masks"]["broken"] == inspected["codes"]["broken"] == []
    assert any(float(record["relative_error"]) > 0 for record in found["steps"][2]["layers"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tiny.ids()).logits.isfinite().all()


def test_stopped_and_run_again_it_ends_with_the_same_bytes(llama, texts, tmp_path, monkeypatch):
    step = {"method": "qat", "format": "W3A4KV4 g8", **FAST}
    duramen.run(recipe(texts, step), str(llama), tmp_path / "whole")
    real, calls = qat.Imitation.terms, []

    def terms(self, rows):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(qat.Imitation, "terms", terms)
    with pytest.raises(KeyboardInterrupt):
        duramen.run(recipe(texts, step), str(llama), tmp_path / "again")
    again = duramen.run(recipe(texts, step), str(llama), tmp_path / "again")
    for name in (CODES, FORMATS, *(file.name for file in (tmp_path / "whole").glob("model*"))):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert again["steps"][0]["training"] == whole["steps"][0]["training"]


def test_recomputed_blocks_and_small_parts_give_the_same():
    found = []
    for more in ({}, {"recompute": True}, {"at_once": 1}):
        walk = Walk()
        torch.manual_seed(0)
        get_method("qat").apply(tiny.model("llama"), tiny.ids(32, 20), walk=walk, format="W4A6KV6 g8", **FAST | more)
        found.append(walk.training["losses"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-3)


def test_what_cannot_be_is_said(llama, texts, tmp_path):
    tokens = tiny.ids(16, 20)
    with pytest.raises(Problem, match="Nothing says what is to be rounded"):
        get_method("qat").apply(tiny.model("llama"), tokens, **FAST)
    with pytest.raises(Problem, match="has nothing to look at") as caught:
        get_method("qat").apply(tiny.model("mamba2"), tokens, format="W4 g8", **FAST)
    assert "map_loss" in caught.value.fix
    with pytest.raises(Problem, match="needs the dense model"):
        get_method("qat").apply(tiny.model("llama"), tokens, format="W4 g8", objective="ce", **FAST)
    with pytest.raises(Problem, match="cannot compare"):
        get_method("qat").apply(tiny.model("llama"), tokens, dense=tiny.model("zamba2"), format="W4 g8", **FAST)
    with pytest.raises(Problem, match=r"The (loss of step|held-out loss)"):
        get_method("qat").apply(tiny.model("llama"), tokens, format="W4 g8", map_loss="off", **FAST | {"step_rate": 1e30})
    walk = Walk()
    get_method("qat").apply(tiny.model("mamba2"), tokens, walk=walk, format="W4 g8", map_loss="off", **FAST)
    assert walk.training["losses"]
    planned = duramen.plan(recipe(texts, {"method": "qat", "format": parse_format("W4A8 g8").text, **FAST}), str(llama))
    assert "weights in 21 layers and their steps" in planned["steps"][0]["note"]
