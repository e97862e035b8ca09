"""Limits on the time of a prefill: tables add up, parts are really timed, and a search under such a limit runs through."""

import pytest
import torch

import tiny
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.registry import get_method
from duramen.search import latency
from duramen.search.constraints import limits
from duramen.search.evolution import Settings, chosen_modules
from duramen.shrink.plan import Plan, digest
from duramen.shrink.surgery import Surgery

SMALL = {"levels": 4, "round_to": 8, "damping": 0.01, "dense_target": 0.0}


def made(name="llama"):
    model = BlockModel.from_module(tiny.model(name))
    return model, chosen_modules(model, Settings(target={"latency": 0.7}, **SMALL))


def test_a_candidate_costs_what_its_parts_take(monkeypatch):
    """With clocks that count units: 5 ms outside, 1 for a block, 0.25 a channel, 2 a KV group."""
    model, modules = made()

    def stack(model, widths, blocks):
        sizes = model.sizes(blocks[0])
        mlp, heads = 0.25 * widths.get("ffn_channel", sizes.ffn), 2.0 * widths.get("kv_group", sizes.groups)
        return {"whole": 100.0, "outside": 5.0, "block": 1 + mlp + heads, "mlp": mlp, "attention": heads}

    monkeypatch.setattr(latency, "_stack", stack)
    (limit,) = limits(model, modules, {"latency": 0.7}, bits=16)
    for levels in ([0] * len(modules), [1] * len(modules), [m.full for m in modules]):
        kept = [(m.units.kind, m.grid[level]) for m, level in zip(modules, levels, strict=True)]
        expected = 5 + len(model.blocks) + sum(0.25 * n if kind == "ffn_channel" else 2.0 * n for kind, n in kept)
        assert limit.cost(tuple(levels)) == pytest.approx(expected)
    assert limit.most == pytest.approx(0.7 * limit.whole)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox", "bloom", "phi3", "gemma3_text"])
def test_parts_of_every_family_are_timed(name, monkeypatch):
    model, modules = made(name)
    monkeypatch.setattr(latency, "STEADY", 1e9)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    found = latency.prefill_costs(model, modules)
    for module, levels in zip(modules, found["table"], strict=True):
        assert len(levels) == len(module.grid)
        for kept, milliseconds in zip(module.grid, levels, strict=True):
            assert (milliseconds > 0) == (kept > 0)
    whole = latency.prefills({"dense": Surgery(model, Plan(digest(model), len(model.blocks)))})["dense"]
    assert 0.2 * whole < found["rest"] + sum(levels[-1] for levels in found["table"]) < 5 * whole


def test_what_is_timed_has_the_shapes_and_type_of_the_result():
    model = BlockModel.from_module(tiny.model("llama").to(torch.bfloat16))
    widths = (4, *[8] * (len(model.blocks) - 1))
    kept = {"ffn_channel": tuple(tuple(range(width)) for width in widths)}
    plan = Plan(digest(model), len(model.blocks), kept, skipped={1: ("attention",)})
    network = latency._empty(Surgery(model, plan))
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network.model.layers[0].mlp.gate_proj.weight.shape == (4, 32)
    assert network.model.layers[1].mlp.gate_proj.weight.shape == (8, 32)
    assert not list(network.model.layers[1].self_attn.parameters())


def test_a_search_under_it_runs_through_and_says_what_was_measured(monkeypatch):
    monkeypatch.setattr(latency, "STEADY", 1e9)
    walk = Walk()
    options = {"target": {"latency": 0.9}, "generations": 1, "offspring": 2, "stages": [], "top_k": 32}
    get_method("search").apply(tiny.model("llama"), tiny.ids(16, 32), walk=walk, **SMALL | options)
    made_by = walk.reshape.plan.made_by
    assert made_by["costs"]["latency"]["winner"] <= made_by["costs"]["latency"]["most"]
    assert set(made_by["prefill"]) == {"dense", "winner"}


def test_a_clock_that_is_not_steady_is_refused(monkeypatch):
    model, modules = made()
    rounds = iter([10.0, 1.0, 1.0, 30.0, 1.0, 1.0, 20.0, 1.0, 1.0])  # the whole, then FFNs and attentions in full width
    part = {"outside": 1.0, "block": 2.0, "mlp": 1.0, "attention": 1.0}
    monkeypatch.setattr(
        latency,
        "_stack",
        lambda model, widths, blocks: part | {"whole": next(rounds) if len(blocks) == 3 and not widths else 1.0},
    )
    with pytest.raises(Problem, match="10 to 30 ms") as caught:
        latency.prefill_costs(model, modules)
    assert "macs" in caught.value.fix


def test_a_level_never_takes_longer_than_a_wider_one():
    assert latency._falling([0.0, 4.0, 4.5, 4.4]) == [0.0, 4.0, 4.4, 4.4]


def test_masks_are_counted_and_not_timed():
    with pytest.raises(ValueError, match="no limit for `latency`"):
        get_method("search_masks").apply(tiny.model("llama"), tiny.ids(16, 32), target={"latency": 0.7})
