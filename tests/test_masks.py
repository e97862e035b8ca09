"""The search for masks: importance by brute force, candidates against the models that they stand for, limits, runs that go on."""

import json
import sys
import types
from functools import partial

import pytest
import torch

import duramen
import tiny
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.registry import get_method
from duramen.search.fitness import losses
from duramen.search.masks import FIRST, LATER, Settings, importance, space_of
from duramen.shrink.groups import find_units
from duramen.shrink.surgery import Surgery, masked

BOTH = ("ffn_channel", "kv_group")
FEW = {"epochs": 3, "population": 8, "mutants": 4, "crossovers": 3, "parents": 3, "fitness_tokens": 64, "damping": 0.01}


def space(name="llama", share=0.7, families=BOTH):
    model = BlockModel.from_module(tiny.model(name))
    chosen = Settings(target={"block_parameters": share}, families=families)
    units = find_units(model, BOTH)
    here = space_of(model, chosen, importance(model, units, tiny.ids(8, 32), Walk()))
    here.fewest_blocks = 1  # of two or three, which the rule for whole models leaves alone
    return here


@torch.no_grad()
def test_importance_is_twice_what_the_outputs_lose_by_each_weight():
    """Equation 1 for one FFN: every weight of a row of gate and up, or of a column of down, deleted alone and the rest of its row solved again."""
    model, tokens = BlockModel.from_module(tiny.model("llama")), tiny.ids(8, 32)
    (units,) = [each for each in find_units(model, ("ffn_channel",)) if each.block == 1]
    found = importance(model, [units], tokens, Walk())[1, "ffn_channel"]
    expected = torch.zeros(units.count, dtype=torch.float64)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer, seen = model.blocks[1].mlp.get_submodule(name), []
        with layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
            model.network(tokens)
        rows = seen[0].flatten(0, 1).double()
        gram = rows.T @ rows
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        rises = torch.zeros(layer.weight.shape, dtype=torch.float64)
        for column in range(len(gram)):
            others = [index for index in range(len(gram)) if index != column]
            left = gram[column, column] - gram[column, others] @ torch.linalg.solve(
                gram[others][:, others], gram[others, column]
            )
            rises[:, column] = layer.weight[:, column].double().square() * left
        expected += 2 * rises.sum(0 if name == "down_proj" else 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
@torch.no_grad()
def test_candidates_side_by_side_are_the_models_that_they_stand_for(name):
    here, tokens = space(name), tiny.ids(3, 32)
    generator = torch.Generator().manual_seed(0)
    chances = {"blocks": 1.0, "widths": 0.5, "masks": 0.5}
    candidates = [here.child(here.start(generator), chances, generator) for _ in range(6)]
    assert any(here.gone(each) for each in candidates), "no block left in any candidate"
    for each, found in zip(candidates, losses(here, candidates, tokens), strict=True):
        with masked(here.model, here.plan(each, {})):
            logits = here.model.network(tokens).logits[:, :-1]
        assert found == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())), rel=1e-4
        )


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_every_candidate_is_inside_its_limit_and_costs_what_surgery_leaves(share):
    here, generator = space(share=share), torch.Generator().manual_seed(1)
    (limit,) = here.bounds
    parents = [here.start(generator)]
    outside = 259 * 32 * 2 + 32
    for number in range(30):
        child = here.child(parents[number % len(parents)], FIRST if number % 2 else LATER | {"blocks": 0.5}, generator)
        others = [each for each in parents if len(here.gone(each)) == len(here.gone(child))]
        mixed = here.crossed(child, others[-1], generator) if others else child
        parents += [child, mixed]
        for each in (child, mixed):
            cost = limit.cost(tuple(map(len, each)))
            assert cost <= limit.most
            norms = 2 * 32 * len(here.gone(each))
            assert Surgery(here.model, here.plan(each, {})).summary["parameters"]["after"] - outside == cost - norms
            for module, units, counts in zip(here.modules, each, here.counts, strict=True):
                assert len(units) == len(set(units))
                assert not units or module.units.block not in here.gone(each)
                assert not units or len(units) in counts
            if number and each is child:
                assert any(len(units) < module.units.count for module, units in zip(here.modules, each, strict=True))


def test_mutants_keep_what_similarity_says():
    here, generator = space(families=("ffn_channel",)), torch.Generator().manual_seed(2)
    parent = here.start(generator)
    for _ in range(20):
        child = here.child(parent, {"blocks": 0.0, "widths": 0.3, "masks": 1.0}, generator)
        for old, new in zip(parent, child, strict=True):
            assert len({*old} & {*new}) >= 0.8 * min(len(old), len(new)) - 1e-9


class Stopped(Exception):
    """Instead of a kill."""


def test_a_stopped_search_goes_on_to_the_same_end():
    def run(memory, stop=""):
        def memo(name, compute):
            if name == stop:
                raise Stopped
            if name not in memory:
                memory[name] = compute()
            return memory[name]

        walk = Walk(memo=memo)
        get_method("search_masks").apply(
            tiny.model("llama"), tiny.ids(16, 32), walk=walk, target={"block_parameters": 0.7}, **FEW
        )
        return walk.reshape.plan

    memory = {}
    with pytest.raises(Stopped):
        run(memory, "epoch-0002")
    assert run(memory) == run({})
    again = run({})
    assert again.made_by["costs"]["block_parameters"]["winner"] <= again.made_by["costs"]["block_parameters"]["most"]
    assert 64 * 20 < again.made_by["tokens"] <= (8 + 2 * 11) * 64


class PretendedRay:
    """Ray whose actors are in this process; a cluster of its own runs in test_search."""

    __spec__ = True  # it is there
    exceptions = types.SimpleNamespace(RayActorError=RuntimeError, OutOfMemoryError=MemoryError)
    init = put = get = staticmethod(lambda value=None, **_: value)
    shutdown, cluster_resources = staticmethod(lambda: None), staticmethod(lambda: {"CPU": 2})
    started = 0

    @classmethod
    def remote(cls, **_):
        """What makes the class of an actor."""

        def start(kind, *args):
            cls.started += 1
            actor = kind(*args)
            return types.SimpleNamespace(measure=types.SimpleNamespace(remote=actor.measure))

        return lambda kind: types.SimpleNamespace(remote=partial(start, kind))


def test_workers_end_at_the_same_masks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", PretendedRay)
    folder, text = tiny.save("llama", tmp_path / "llama"), tmp_path / "prose.txt"
    text.write_text(tiny.prose(1, 4000))
    step = {"method": "search_masks", "target": {"block_parameters": 0.7}, **FEW}
    recipe = {"calibration": {"text": [str(text)], "sequences": 16, "length": 32}, "dtype": "float32", "steps": [step]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    duramen.run(tmp_path / "recipe.yaml", folder, tmp_path / "alone")
    duramen.run(tmp_path / "recipe.yaml", folder, tmp_path / "shared", workers=2)
    assert PretendedRay.started == 2
    alone, shared = ((tmp_path / name / "pruning_plan.json").read_text() for name in ("alone", "shared"))
    assert alone == shared


def test_parents_meet_their_children_on_the_same_tokens():
    """With the whole pool in every epoch the best fitness never rises."""
    walk = Walk()
    get_method("search_masks").apply(
        tiny.model("llama"),
        tiny.ids(16, 32),
        walk=walk,
        target={"block_parameters": 0.7},
        **FEW | {"fitness_tokens": 10**6, "fitness": "kl", "epochs": 5},
    )
    lineage = walk.reshape.plan.made_by["lineage"]
    assert lineage == sorted(lineage, reverse=True)


def test_more_children_than_a_population_are_refused():
    with pytest.raises(ValueError, match="more than a population of 20"):
        Settings(target={"parameters": 0.8}, population=20)


def test_what_masks_cannot_reach_is_refused():
    with pytest.raises(Problem, match="these masks leave") as caught:
        get_method("search_masks").apply(tiny.model("llama"), tiny.ids(16, 32), target={"parameters": 0.45}, **FEW)
    assert "search" in caught.value.fix
