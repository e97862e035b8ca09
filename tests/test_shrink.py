"""Cutting units: repair, budgets, whole runs, what is saved, and every mistake that a user makes."""

import copy
import json
import os
import subprocess
import sys
from itertools import combinations, pairwise

import pytest
import torch
from safetensors.torch import load_file

import duramen
import tiny
from duramen.calibrate.walker import Walk
from duramen.export.hf import MASKS
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.prune.reconstruct import reconstruct, solve_direct
from duramen.registry import get_method
from duramen.rundir import unpack_mask
from duramen.shrink.allocate import allocate
from duramen.shrink.groups import find_units
from duramen.shrink.plan import Plan, digest
from duramen.shrink.reform import alternating, reform
from duramen.shrink.surgery import masked, shrunk
from test_golden import GRAM, HESSIAN, WEIGHT, X, relative
from test_surgery import random_plan

FREE = {"round_to": 1, "minimum": 2, "families": ["ffn_channel", "kv_group"]}


@pytest.mark.parametrize(
    ("kept", "before", "after"),
    [
        ([0, 3, 4, 5, 8, 11], 0.2882825647, 0.1411027679),
        ([1, 2, 4, 5, 8, 11], 0.1167265726, 0.0417811939),
        ([0, 1, 2, 3, 5, 11], 0.2670860554, 0.1207737942),
    ],
)
def test_golden_repair(kept, before, after):
    columns = torch.tensor([column for column in range(12) if column not in kept])
    assert relative(reform(WEIGHT, GRAM, columns=columns, solve=False).weight) == pytest.approx(before, abs=1e-9)
    assert relative(reform(WEIGHT, GRAM, columns=columns).weight) == pytest.approx(after, abs=1e-9)


def test_whole_columns_are_solved_like_any_mask():
    weight, pruned = torch.randn(5, 12, dtype=torch.float64), torch.zeros(5, 12, dtype=torch.bool)
    for columns in ([0], [1, 5, 7], list(range(11)), list(range(12))):
        pruned = torch.zeros(5, 12, dtype=torch.bool)
        pruned[:, columns] = True
        together = reconstruct(weight, GRAM, pruned).weight
        one_by_one = torch.cat([solve_direct(weight[row : row + 1], HESSIAN, pruned[row : row + 1]) for row in range(5)])
        torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-12)
    assert torch.equal(reconstruct(weight, GRAM, pruned & False).weight, weight)


def test_repairs_are_ordered_for_every_subset():
    """On the same moments and without damping: bias ≤ none, and affine ≤ bias and ≤ linear, for all 924 sets of six columns."""
    mean = X.mean(1)
    about = GRAM - torch.outer(mean, mean)

    def error(weight, *, bias):
        shift = (WEIGHT - weight) @ mean if bias else torch.zeros(4, dtype=torch.float64)
        return float(((weight - WEIGHT) @ X + shift[:, None]).square().sum()) / X.shape[1]

    for gone in combinations(range(12), 6):
        columns = torch.tensor(gone)
        cut = reform(WEIGHT, GRAM, columns=columns, solve=False).weight
        linear = reform(WEIGHT, GRAM, columns=columns, damping=1e-12).weight
        affine = reform(WEIGHT, about, columns=columns, damping=1e-12).weight
        assert error(cut, bias=True) <= error(cut, bias=False) + 1e-12
        assert error(affine, bias=True) <= min(error(linear, bias=False), error(cut, bias=True)) + 1e-9
        assert error(linear, bias=False) <= error(cut, bias=False) + 1e-9


@pytest.mark.parametrize(
    ("scaled", "penalty", "expected"),
    [(False, 1.0, 0.0420966065), (False, 10.0, 0.0334727621), (True, 0.1, 0.0334799490), (True, 1.0, 0.0333386396)],
)
def test_golden_alternating_reformation_is_never_better(scaled, penalty, expected):
    """Undamped relative errors on the kept set {1, 2, 3, 5, 8, 11}, on XXᵀ as it is and with a unit diagonal."""
    gone, raw = torch.tensor([0, 4, 6, 7, 9, 10]), X @ X.T
    scale = raw.diagonal().sqrt() if scaled else torch.ones(12, dtype=torch.float64)
    found = alternating(WEIGHT * scale, raw / scale[:, None] / scale, gone, penalty=penalty) / scale
    whole = float((WEIGHT @ X).square().sum())

    def error(weight):
        return float(((weight - WEIGHT) @ X).square().sum()) / whole

    assert error(found) == pytest.approx(expected, abs=1e-9)
    best = error(reform(WEIGHT, GRAM, columns=gone, damping=0.0).weight)
    assert best == pytest.approx(0.0333386396, abs=1e-9)
    assert error(found) >= best * (1 - 1e-9)
    settled = alternating(WEIGHT * scale, raw / scale[:, None] / scale, gone, penalty=penalty, iterations=3000) / scale
    assert error(settled) == pytest.approx(best, abs=1e-7)


def test_a_sparse_layer_keeps_its_zeros():
    weight = WEIGHT.clone()
    weight[:, ::2] = 0
    found = reform(weight, GRAM, columns=torch.tensor([1]))
    assert bool((found.weight[:, ::2] == 0).all())
    assert bool((found.weight[:, 1] == 0).all())
    assert bool((found.weight[:, 3::2] != 0).all())


def units_of(name="llama", kinds=("ffn_channel", "kv_group")):
    return find_units(BlockModel.from_module(tiny.model(name)), kinds)


def counts(units, wanted, **options):
    scores = {(each.block, each.kind): torch.arange(each.count, 0, -1, dtype=torch.float32) for each in units}
    settings = {"allocation": "local", "round_to": 1, "minimum": 2} | options
    return allocate([each.slots for each in units], scores, wanted, **settings)


def test_budgets():
    units = units_of()
    size = sum(each.count * each.parameters for each in units)
    for share in (0.1, 0.2, 0.33, 0.5, 0.7):
        gone = counts(units, share * size)
        removed = sum(len(gone[each.block, each.kind]) * each.parameters for each in units)
        assert removed == pytest.approx(share * size, abs=3 * 97)
        for block in range(3):
            assert gone[block, "ffn_channel"] == gone[0, "ffn_channel"], "the same share everywhere"
            assert len(gone[block, "kv_group"]) < 2
    assert counts(units, 0) == {(each.block, each.kind): [] for each in units}
    gone = counts(units_of(kinds=("ffn_channel",)), 0.5 * 3 * 48 * 96, round_to=16)
    assert all(len(units) in (16, 32) for units in gone.values()), "widths are multiples of 16"


def test_ties_go_by_index_and_the_least_goes_first():
    (each, *_) = units_of(kinds=("ffn_channel",))
    equal = allocate([each], {(0, "ffn_channel"): torch.ones(48)}, 5 * 96, allocation="local", round_to=1, minimum=1)
    assert equal == {(0, "ffn_channel"): [0, 1, 2, 3, 4]}
    dead = torch.ones(48)
    dead[[7, 30]] = 0
    first = allocate([each], {(0, "ffn_channel"): dead}, 2 * 96, allocation="local", round_to=1, minimum=1)
    assert first == {(0, "ffn_channel"): [7, 30]}


def test_global_takes_the_least_per_parameter():
    units = units_of()
    scores = {(each.block, each.kind): torch.full((each.count,), 1.0 + each.block) * each.parameters for each in units}
    gone = allocate(units, scores, 40 * 96, allocation="global", round_to=1, minimum=2)
    assert sum(len(found) for (block, _), found in gone.items() if block) == 0
    standardised = allocate(units, scores, 40 * 96, allocation="flap", round_to=1, minimum=2)
    assert sum(len(found) for found in standardised.values()) > 0


def test_too_much_is_refused():
    units = units_of()
    size = sum(each.count * each.parameters for each in units)
    with pytest.raises(Problem, match="are to go, and at most") as caught:
        counts(units, 0.99 * size)
    assert "smaller `ratio`" in caught.value.fix


@pytest.mark.parametrize("allocation", ["local", "global", "flap"])
def test_a_cut_that_takes_nothing_out_is_said(allocation):
    with pytest.raises(Problem, match="10 parameters are to go, and no unit is so small") as caught:
        counts(units_of(), 10, allocation=allocation)
    assert "larger `ratio`" in caught.value.fix
    with pytest.raises(Problem, match="no unit is so small"):
        counts(units_of(kinds=("ffn_channel",)), 3 * 5 * 96, round_to=16, allocation=allocation)


METHODS = [
    ("fusion", {"gradient_sequences": 4, "gradient_length": 16}),
    ("fusion", {"gradient_sequences": 4, "gradient_length": 16, "fusion": "search", "allocation": "global"}),
    ("fusion", {"gradient_sequences": 4, "gradient_length": 16, "fusion": "ablation"}),
    ("fusion", {"gradient_sequences": 4, "gradient_length": 16, "fusion": "per_group", "coarse": "mask_fisher"}),
    ("llm_pruner", {"gradient_sequences": 4, "gradient_length": 16, "grain": "vector", "order": "mix"}),
    ("wanda_sp", {"families": ["ffn_channel"]}),
    ("wanda_sp", {"families": ["query_head"], "ratio": 0.12}),
    ("flap", {}),
]


@pytest.mark.parametrize(("method", "settings"), METHODS)
@torch.no_grad()
def test_every_method_cuts_and_repairs(method, settings):
    network, tokens, walk = tiny.model("llama"), tiny.ids(16, 32), Walk()
    whole = {"ratio": 0.2, "ratio_of": "block_parameters"} | FREE | settings
    records = get_method(method).apply(network, tokens, walk=walk, **whole)
    plan = walk.reshape.plan
    assert plan.made_by["method"] == method
    assert plan.made_by["ratio"] == pytest.approx(whole["ratio"], abs=0.03)
    assert records
    assert all(0 <= record["relative_error"] < 1 for record in records)
    model = BlockModel.from_module(network)
    small = shrunk(model, plan)
    torch.testing.assert_close(small(tokens).logits, network(tokens).logits, rtol=1e-4, atol=1e-4)
    assert Plan.from_json(plan.to_json()) == plan


@torch.no_grad()
def test_repair_helps_and_aims_at_the_dense_model():
    """Mean error of the cut projections: with repair below without, from the same plan."""
    errors = {}
    for repair in ("none", "reform"):
        network, tokens = tiny.model("llama"), tiny.ids(16, 64)
        settings = {"ratio": 0.3, "ratio_of": "block_parameters", "repair": repair, "dense_target": 0.0, **FREE}
        errors[repair] = sum(record["relative_error"] for record in get_method("wanda_sp").apply(network, tokens, **settings))
    assert errors["reform"] < 0.8 * errors["none"]


def write_recipe(folder, steps):
    (folder / "text.txt").write_text(tiny.prose(0, 3000))
    return {
        "name": "tiny",
        "dtype": "float32",
        "calibration": {"text": [str(folder / "text.txt")], "sequences": 16, "length": 64},
        "steps": [{"id": f"s{number}", **step} for number, step in enumerate(steps)],
    }


OUTSIDE = """
import json, sys, torch
sys.modules["duramen"] = None
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    folder, remote, file = json.loads(line)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, dtype="float32").eval()
    tokens = torch.load(file)
    with torch.no_grad():
        logits = model(tokens).logits
        kept, again = (model.generate(tokens[:1], max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False))
    assert kept.tolist() == again.tolist()
    model.save_pretrained(folder + "-again")
    twin = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=remote, dtype="float32").eval()
    with torch.no_grad():
        assert torch.equal(twin(tokens).logits, logits)
    torch.save(logits, file)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Logits from a process that cannot import Duramen, which also saves the model again and opens that."""
    place = tmp_path_factory.mktemp("outside")
    own = os.environ | {"HF_MODULES_CACHE": str(place / "modules"), "PYTHONWARNINGS": "ignore"}
    with (
        (place / "said").open("w+") as said,
        subprocess.Popen(
            [sys.executable, "-c", OUTSIDE], env=own, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        ) as stranger,
    ):

        def logits(folder, remote, tokens):
            torch.save(tokens, place / "tokens.pt")
            stranger.stdin.write(json.dumps([str(folder), remote, str(place / "tokens.pt")]) + "\n")
            stranger.stdin.flush()
            assert stranger.stdout.readline() == "done\n", (place / "said").read_text()
            return torch.load(place / "tokens.pt")

        yield logits
        stranger.stdin.close()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "opt", "bloom", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_saved_and_opened_without_duramen(name, ratio, outside, tmp_path):
    source, tokens = tiny.save(name, tmp_path / "model"), tiny.ids(2, 20)
    cut = {"method": "wanda_sp", "ratio": ratio, "ratio_of": "block_parameters", "allocation": "global", **FREE}
    out = tmp_path / "out"
    results = duramen.run(write_recipe(tmp_path, [cut]), str(source), out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == f"duramen_{name}"
    assert results["steps"][0]["reopened"]["largest_difference"] < 1e-4
    here = BlockModel.from_folder(out)
    (hidden,) = here.last_hidden([tokens])
    assert torch.equal(outside(out, True, tokens), here.logits(hidden).detach())
    plan = Plan.load(out / "pruning_plan.json")
    assert plan.base == digest(BlockModel.from_folder(source))
    for units in find_units(here, tuple(plan.kept)):
        assert units.count == len(plan.kept[units.kind][units.block])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_homogenised_opens_in_the_stock_class(name, outside, tmp_path):
    source, tokens = tiny.save(name, tmp_path / "model"), tiny.ids(2, 20)
    cut = {"method": "wanda_sp", "ratio": 0.3, "ratio_of": "block_parameters", "allocation": "global", **FREE}
    duramen.run(write_recipe(tmp_path, [cut | {"homogenise": True}]), str(source), tmp_path / "wide")
    duramen.run(write_recipe(tmp_path, [cut]), str(source), tmp_path / "narrow")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["model_type"] == name
    assert not (tmp_path / "wide" / "modeling_duramen.py").exists()
    narrow = outside(tmp_path / "narrow", True, tokens)
    torch.testing.assert_close(outside(tmp_path / "wide", False, tokens), narrow, rtol=1e-5, atol=1e-5)


def test_uniform_widths_are_a_stock_model(outside, tmp_path):
    source, tokens = tiny.save("llama", tmp_path / "model"), tiny.ids(2, 20)
    cut = {"method": "fusion", "ratio": 0.2, "allocation": "local", "gradient_sequences": 4, "gradient_length": 16, **FREE}
    out = tmp_path / "out"
    results = duramen.run(write_recipe(tmp_path, [cut]), str(source), out)
    assert results["steps"][0]["shape"]["opens_in"] == "plain transformers"
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"], config["head_dim"]) == ("llama", 1, 8)
    assert not (out / "modeling_duramen.py").exists()
    assert outside(out, False, tokens).isfinite().all()
    assert "million parameters instead of" in (out / "report.html").read_text()


@torch.no_grad()
def test_steps_follow_one_another(outside, tmp_path):
    """Cut, drop a block, skip a part, cut again, prune weights: shapes add up, masks follow, and one plan says it all."""
    source, tokens = tiny.save("llama", tmp_path / "model"), tiny.ids(2, 20)
    steps = [
        {"method": "multiweight", "sparsity": 0.5, "effort": "fast"},
        {"method": "wanda_sp", "ratio": 0.2, "ratio_of": "units", "allocation": "global", **FREE},
        {"method": "depth", "count": 1},
        {"method": "depth", "parts": "attention", "count": 1},
        {"method": "wanda_sp", "ratio": 0.2, "ratio_of": "units", **FREE, "families": ["ffn_channel"]},
    ]
    out = tmp_path / "out"
    results = duramen.run(write_recipe(tmp_path, steps), str(source), out)
    shapes = [step["shape"] for step in results["steps"]]
    assert shapes[0] is None
    for earlier, later in pairwise(shapes[1:]):
        assert earlier["parameters"]["after"] == later["parameters"]["before"] > later["parameters"]["after"]
    final = BlockModel.from_folder(out)
    assert len(final.blocks) == 2
    assert shapes[-1]["parameters"]["after"] == sum(p.numel() for p in final.network.parameters())
    plan = Plan.load(out / "pruning_plan.json")
    assert (len(plan.dropped), list(map(len, plan.skipped.values()))) == (1, [1])
    (hidden,) = final.last_hidden([tokens])
    assert torch.equal(outside(out, True, tokens), final.logits(hidden))
    masks = load_file(out / MASKS)
    for name, packed in masks.items():
        with final.opened(int(name.split(".")[2])) as block:
            weight = block.tensors[f"{name}.weight"]
        mask = unpack_mask(packed, weight.shape[1])
        assert mask.shape == weight.shape
        assert bool((weight[mask] == 0).all())
        assert 0.2 < float(mask.float().mean()) < 0.8
    dense = BlockModel.from_folder(source)
    kept = plan.kept["ffn_channel"]
    gate = load_file(out / "model-00002-of-00003.safetensors")
    (name,) = (name for name in gate if name.endswith("gate_proj.weight"))
    block = next(index for index in range(3) if index not in plan.dropped)
    with dense.opened(block) as open_block:
        source_gate = open_block.tensors[f"model.layers.{block}.mlp.gate_proj.weight"]
    assert gate[name].shape == source_gate[list(kept[block])].shape


@torch.no_grad()
def test_parts_leave_where_they_are(outside, tmp_path):
    source, out = tiny.save("llama", tmp_path / "model"), tmp_path / "out"
    step = {"method": "depth", "parts": "attention", "count": 1}
    steps = [step, step | {"id": "again"}, step | {"id": "mlp", "parts": "mlp"}]
    results = duramen.run(write_recipe(tmp_path, steps), str(source), out)
    plan = Plan.load(out / "pruning_plan.json")
    assert sorted(block for block, parts in plan.skipped.items() if "attention" in parts) == [1, 2]
    assert sum("mlp" in parts for parts in plan.skipped.values()) == 1
    assert results["steps"][1]["shape"]["parameters"]["after"] < results["steps"][0]["shape"]["parameters"]["after"]
    tokens = tiny.ids(2, 20)
    opened = BlockModel.from_folder(out)
    assert torch.equal(outside(out, True, tokens), opened.logits(opened.last_hidden([tokens])[0]))
    with pytest.raises(Problem, match="1 of 3 blocks are to lose their attention, and at most 0 can"):
        duramen.run(write_recipe(tmp_path, [step]), str(out), tmp_path / "none")


def test_nothing_to_cut_changes_nothing(tmp_path):
    source = tiny.save("llama", tmp_path / "model")
    out = tmp_path / "out"
    duramen.run(write_recipe(tmp_path, [{"method": "fusion", "ratio": 0.0}]), str(source), out)
    before, after = load_file(source / "model.safetensors"), {}
    for file in out.glob("model-*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    source = tiny.save("llama", tmp_path / "model")
    recipe = write_recipe(
        tmp_path, [{"method": "fusion", "ratio": 0.3, "gradient_sequences": 4, "gradient_length": 16, **FREE}]
    )
    duramen.run(recipe, str(source), tmp_path / "whole")
    from duramen.rundir import BlockStore

    real, saved = BlockStore.save, []

    def save(self, index, *rest):
        if index == 2 and not saved:
            saved.append(index)
            raise KeyboardInterrupt
        real(self, index, *rest)

    monkeypatch.setattr(BlockStore, "save", save)
    with pytest.raises(KeyboardInterrupt):
        duramen.run(recipe, str(source), tmp_path / "killed")
    monkeypatch.setattr("duramen.shrink.fusion.walk_back", None)  # the scores are kept and not computed again
    duramen.run(recipe, str(source), tmp_path / "killed")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def test_a_saved_plan_is_carried_out(tmp_path):
    source = tiny.save("llama", tmp_path / "model")
    cut = {"method": "wanda_sp", "ratio": 0.3, **FREE}
    duramen.run(write_recipe(tmp_path, [cut]), str(source), tmp_path / "first")
    again = {"method": "cut", "plan": str(tmp_path / "first" / "pruning_plan.json")}
    duramen.run(write_recipe(tmp_path, [again]), str(source), tmp_path / "second")
    for file in (tmp_path / "first").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    plan = tmp_path / "first" / "pruning_plan.json"
    plan.write_text(plan.read_text() + " ")
    with pytest.raises(Problem, match=r"holds another run; it differs in:\n    steps\[0\]\.files.*pruning_plan\.json"):
        duramen.run(write_recipe(tmp_path, [again]), str(source), tmp_path / "second")
    sibling = tiny.save("qwen2", tmp_path / "sibling")
    with pytest.raises(Problem, match="is of another model: it is for tensors"):
        duramen.run(write_recipe(tmp_path, [again]), str(sibling), tmp_path / "third")
    with pytest.raises(Problem, match="There is no plan"):
        duramen.run(write_recipe(tmp_path, [again | {"plan": "nowhere.json"}]), str(source), tmp_path / "fourth")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(Problem, match="This is no pruning plan"):
        duramen.run(write_recipe(tmp_path, [again | {"plan": str(tmp_path / "bad.json")}]), str(source), tmp_path / "fifth")


@pytest.mark.parametrize(
    ("name", "step", "words"),
    [
        ("mamba", {"method": "fusion", "ratio": 0.2}, "no table of ffn_channel units"),
        ("opt", {"method": "fusion", "ratio": 0.2, "families": ["query_head"]}, "no table of query_head units"),
        ("llama", {"method": "fusion", "ratio": 0.99, **FREE}, "at most"),
        ("llama", {"method": "fusion", "ratio": 1.0}, "`ratio` is 1.0"),
        ("llama", {"method": "fusion"}, "`ratio`"),
        ("llama", {"method": "fusion", "ratio": 0.2, "families": ["kv_group", "query_head"]}, "both kv_group and query_head"),
        ("llama", {"method": "fusion", "ratio": 0.2, "only": ["donw"]}, "matches no layer"),
        ("llama", {"method": "depth", "count": 3}, "at most 2 can"),
        ("llama", {"method": "depth", "parts": "attention", "count": 3}, "at most 2 can"),
        ("llama", {"method": "depth", "count": 1, "protect": [1, 3]}, "names blocks .3., and the model has"),
    ],
)
def test_mistakes(name, step, words, tmp_path):
    source = tiny.save(name, tmp_path / "model")
    with pytest.raises(Problem, match=words) as caught:
        duramen.run(write_recipe(tmp_path, [step]), str(source), tmp_path / "out")
    assert caught.value.fix


def test_a_part_with_a_bias_cannot_be_filled_with_zeros():
    from duramen.shrink.surgery import homogenised

    model = BlockModel.from_module(tiny.model("opt"))
    with pytest.raises(Problem, match="attention of block 1 cannot be filled"):
        homogenised(model, Plan("", 3, skipped={1: ("attention",)}))


@torch.no_grad()
def test_skipped_parts_can_be_filled_where_nothing_is_added():
    from duramen.shrink.surgery import homogenised

    network, tokens = tiny.model("llama"), tiny.ids()
    model = BlockModel.from_module(network)
    plan = random_plan(model, ("ffn_channel",), skipped={1: ("attention",), 2: ("mlp",)})
    wide = homogenised(model, plan)
    small = shrunk(model, wide)
    assert type(small).__name__ == "LlamaForCausalLM"
    with masked(model, plan):
        torch.testing.assert_close(small(tokens).logits, network(tokens).logits, rtol=1e-5, atol=1e-5)


def test_influence_finds_the_idle_block():
    from duramen.shrink.depth import influences

    network = tiny.model("llama")
    with torch.no_grad():
        network.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)
        network.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
        network.model.layers[2].mlp.down_proj.weight.mul_(1e-3)
    model, tokens = BlockModel.from_module(network), tiny.ids()
    whole, mlps = influences(model, tokens, "block"), influences(model, tokens, "mlp")
    assert min(range(3), key=whole.__getitem__) == 1
    assert mlps[2] < 1e-3 < mlps[0]


def test_plan_and_inspect_show_groups(tmp_path):
    source = tiny.save("llama", tmp_path / "model")
    found = duramen.plan(write_recipe(tmp_path, [{"method": "fusion", "ratio": 0.2, **FREE}]), str(source))
    step = found["steps"][0]
    assert {item["kind"]: item["units"] for item in step["units"]} == {"ffn_channel": 48, "kv_group": 2}
    assert step["parameters"]["after"] < step["parameters"]["before"]
    assert found["macs_per_token"]["after"] < found["macs_per_token"]["before"]
    step = {"method": "wanda_sp", "ratio": 0.2, "ratio_of": "units", **FREE}
    steps = [step, {"method": "depth", "count": 1}, {"method": "depth", "id": "part", "parts": "attention", "count": 1}]
    steps += [
        step | {"id": "again", "families": ["ffn_channel"]},
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "depth", "id": "last", "count": 1},
    ]
    foretold = duramen.plan(write_recipe(tmp_path, steps), str(source))["steps"]
    assert foretold[4]["roles"][0]["layers"] == 1, "attention has left the other"
    assert sum(role["parameters"] for role in foretold[4]["roles"]) < foretold[3]["parameters"]["after"]
    found = duramen.run(write_recipe(tmp_path, steps), str(source), tmp_path / "out")["steps"]
    for number in (0, 1, 2, 3):
        assert foretold[number]["parameters"] == found[number]["shape"]["parameters"]
    groups = duramen.inspect(str(source))["groups"]
    assert len(groups) == 9
    assert "self_attn.q_proj.weight[0] x16" in next(item for item in groups if item["kind"] == "kv_group")["members"]


def test_no_block_is_emptied_because_its_units_are_cheap():
    """Half of all units go; without a price of narrowness the cheap block would keep its last one only."""
    units = [each for each in find_units(BlockModel.of(tiny.model("llama")), ("ffn_channel",)) if each.block < 2]
    scores = {(each.block, each.kind): torch.linspace(1, 2, each.count) * (1 if each.block else 0.4) for each in units}
    wanted = sum(each.count * each.parameters for each in units) / 2
    gone = allocate(units, scores, wanted, allocation="global", round_to=1, minimum=1)
    cheap, dear = (len(gone[block, "ffn_channel"]) for block in (0, 1))
    assert cheap + dear == units[0].count
    assert units[0].count / 2 < cheap < 0.9 * units[0].count


def test_a_second_cut_of_heads_finds_its_rows():
    model = tiny.model("gpt2").double().eval()
    once = shrunk(BlockModel.of(model), Plan("", 3, kept={"kv_group": ((0, 2, 3),) * 3}))
    plan = Plan("", 3, kept={"kv_group": ((1, 2), (0, 2), (0, 1))})
    tokens = tiny.ids(2, 12)
    with masked(BlockModel.of(once), plan):
        expected = once(tokens).logits
    torch.testing.assert_close(shrunk(BlockModel.of(once), plan)(tokens).logits, expected)


def test_units_are_cut_where_a_part_has_left(texts, tmp_path):
    """The report's chart has a bar for every block; the plan of both steps is carried out on the first model."""
    source = tiny.save("llama", tmp_path / "model")
    steps = [{"method": "depth", "parts": "attention", "count": 1}, {"method": "wanda_sp", "ratio": 0.3, **FREE}]
    duramen.run(write_recipe(tmp_path, steps), str(source), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()
    again = {"method": "cut", "plan": str(tmp_path / "out" / "pruning_plan.json"), "repair": "none"}
    duramen.run(write_recipe(tmp_path, [again]), str(source), tmp_path / "again")
    shapes = [
        {
            name: tensor.shape
            for file in (tmp_path / place).glob("model*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for place in ("out", "again")
    ]
    assert shapes[0]
    assert shapes[0] == shapes[1]


def test_the_dense_model_is_dense_where_parts_have_left():
    model = tiny.model("llama")
    with masked(BlockModel.of(model), Plan("", 3, skipped={1: ("attention",)}, dropped=(2,))):
        blocks, x = model.model.layers, torch.randn(1, 5, 32)
        turned = model.model.rotary_emb(x, torch.arange(5)[None])
        for block in blocks[1:]:
            copied = copy.deepcopy(block)
            assert not torch.equal(copied(x, position_embeddings=turned), block(x, position_embeddings=turned))
