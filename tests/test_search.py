"""The search: costs against surgery, candidates side by side against one by one, optima by brute force, and whole runs."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import duramen
import tiny
from duramen.calibrate.walker import Walk
from duramen.families import register_own
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.registry import get_method
from duramen.search.constraints import Limit, limits, repair
from duramen.search.database import Database, build, describe, plan_of, restore
from duramen.search.evolution import Settings, chosen_modules
from duramen.search.fitness import divergences, teach
from duramen.search.mutate import switch_levels
from duramen.search.nested import open_nested, write_nested
from duramen.search.surrogate import filled, solve, thought
from duramen.shrink.plan import digest
from duramen.shrink.reform import reform
from duramen.shrink.surgery import Surgery, masked
from duramen.train.objective import Lesson, bucketed_kl, log_rest

SMALL = {"levels": 6, "round_to": 8, "damping": 0.01, "dense_target": 0.0}


def made(name="llama", **options):
    """A tiny model with settings and modules, and their levels' orders in plain order."""
    model = BlockModel.from_module(tiny.model(name))
    chosen = Settings(target={"block_parameters": 0.7}, **SMALL | options)
    modules = [
        replace(m, order=tuple(range(m.units.count)), errors=tuple(1 - kept / m.units.count for kept in m.grid))
        for m in chosen_modules(model, chosen)
    ]
    return model, chosen, modules


def genomes_of(modules, count, seed=0):
    draw = random.Random(seed)
    return [tuple(draw.randrange(len(module.grid)) for module in modules) for _ in range(count)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "opt", "gpt2", "gpt_neox", "bloom", "phi3"])
def test_costs_are_those_of_the_model_that_surgery_makes(name):
    model, _, modules = made(name)
    bounds = limits(
        model, modules, {"parameters": 1.0, "block_parameters": 1.0, "macs": 1.0, "kv_bytes": 1.0, "bytes": 1.0}, bits=4
    )
    by_name = {limit.resource: limit for limit in bounds}
    outside = sum(p.numel() for n, p in model.network.named_parameters() if not n.startswith(f"{model.family.blocks}."))
    full = tuple(module.full for module in modules)
    for genome in [full, *genomes_of(modules, 6)]:
        surgery = Surgery(model, plan_of(model, modules, genome, {}))
        after = surgery.summary["parameters"]["after"]
        assert by_name["parameters"].cost(genome) == after
        assert by_name["block_parameters"].cost(genome) == after - outside
        assert by_name["bytes"].cost(genome) == (after - outside) / 2 + 2 * outside
        assert by_name["macs"].cost(genome) == surgery.summary["macs_per_token"]["after"]
        groups = [len(m.kept(level)) for m, level in zip(modules, genome, strict=True) if m.units.kind == "kv_group"]
        assert by_name["kv_bytes"].cost(genome) == sum(groups) * 4 * model.sizes(0).head
    assert by_name["parameters"].cost(full) == sum(p.numel() for p in model.network.parameters())


def built(tmp_path, name="llama", **options):
    model, chosen, _ = made(name, **options)
    tokens = tiny.ids(8, 32)
    return build(model, chosen_modules(model, chosen), 0.7, tokens, chosen, Walk(), tmp_path), tokens


@torch.no_grad()
def test_levels_are_exact_repairs_and_the_model_stays_as_it_is(tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny.model("llama").state_dict().items()}
    database, tokens = built(tmp_path)
    for name, tensor in database.model.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    seen = []
    layer = database.model.network.get_submodule("model.layers.0.self_attn.o_proj")
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        database.model.network(tokens)
    rows = seen[0].flatten(0, 1).double()
    (number,) = [n for n, m in enumerate(database.modules) if m.units.reader == "model.layers.0.self_attn.o_proj"]
    module = database.modules[number]
    for level, kept in enumerate(module.grid[:-1]):
        if kept:
            gone = module.units.columns(module.units.others(module.kept(level)))
            expected = reform(layer.weight, rows.T @ rows, columns=gone, damping=0.01)
            torch.testing.assert_close(database.reader(number, level)[0], expected.weight, rtol=1e-4, atol=1e-5)
    assert list(module.errors) == sorted(module.errors, reverse=True)
    assert module.errors[-1] == 0


@contextmanager
def standing_for(database, genome):
    """The dense model with its readers replaced and the rest masked, as a candidate has it."""
    model, modules = database.model, database.modules
    saved = {key: value.clone() for key, value in model.network.state_dict().items()}
    for number, (module, level) in enumerate(zip(modules, genome, strict=True)):
        if module.grid[level] and level != module.full:
            weight, bias = database.reader(number, level)
            layer = model.network.get_submodule(module.units.reader)
            layer.weight.copy_(weight.T if model.transposed(module.units.reader) else weight)
            if bias is not None:
                layer.bias.copy_(bias)
    with masked(model, plan_of(model, modules, genome, {})):
        yield
    model.network.load_state_dict(saved)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_candidates_side_by_side_are_the_models_that_they_stand_for(name, tmp_path):
    """With every token counted, KL by the trie equals that of the model with its readers replaced and the rest masked, one by one."""
    database, tokens = built(tmp_path, name)
    model, modules = database.model, database.modules
    lessons = teach(model, tokens[:3], top_k=10**6)
    dense = model.network(tokens[:3]).logits.log_softmax(-1)
    genomes = [database.full, *genomes_of(modules, 5, seed=3)]
    genomes.append((*genomes[1][:-1], modules[-1].full))
    for genome, found in zip(genomes, divergences(database, genomes, tokens[:3], lessons), strict=True):
        with standing_for(database, genome):
            logs = model.network(tokens[:3]).logits.log_softmax(-1)
        kl = float((dense.exp() * (dense - logs)).sum(-1).mean())
        assert found == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert divergences(database, [database.full], tokens[:3], lessons)[0] == pytest.approx(0, abs=1e-6)


@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_one_bucket_for_the_rest_never_overstates(vocabulary, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = (
        (2 * torch.randn(3, vocabulary, generator=generator)).log_softmax(-1),
        torch.randn(3, vocabulary, generator=generator).log_softmax(-1),
    )
    top = p.topk(min(top_k, vocabulary), dim=-1)
    found = bucketed_kl(Lesson(top.indices, top.values, log_rest(top.values)), q)
    whole = (p.exp() * (p - q)).sum(-1)
    assert (found <= whole + 1e-4).all()
    assert (found >= -1e-4).all()
    if top_k >= vocabulary:
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


def puzzle(seed):
    """Random losses and costs of a few modules."""
    model, _, modules = made(levels=3, round_to=16, families=("ffn_channel",))
    draw = random.Random(seed)
    table = tuple((*sorted((draw.random() for _ in m.grid[1:]), reverse=True), 0.0) for m in modules)
    (bound,) = limits(model, modules, {"block_parameters": draw.uniform(0.5, 0.9)}, bits=16)
    return modules, table, bound


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_the_best_of_all_candidates(seed):
    modules, table, bound = puzzle(seed)
    every = product(*(range(len(module.grid)) for module in modules))
    best = min(thought(table, genome) for genome in every if bound.cost(genome) <= bound.most)
    found = solve(table, [bound])
    assert bound.cost(found) <= bound.most
    assert thought(table, found) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_repair_ends_inside_and_leaves_no_room(seed):
    modules, table, bound = puzzle(seed)
    for genome in genomes_of(modules, 20, seed):
        found = repair(genome, [bound], table, modules)
        assert bound.cost(found) <= bound.most
        for number, module in enumerate(modules):
            if found[number] < module.full:
                wider = (*found[:number], found[number] + 1, *found[number + 1 :])
                assert bound.cost(wider) > bound.most, "a module could still go up"
        assert repair(found, [bound], table, modules) == found


def test_switches_within_a_kind_keep_the_budget():
    model, _, modules = made(off=False, families=("ffn_channel",), levels=6, round_to=8)
    (bound,) = limits(model, modules, {"parameters": 0.8}, bits=16)
    generator, parent = torch.Generator().manual_seed(0), tuple(3 for _ in modules)
    children = {switch_levels(parent, modules, generator) for _ in range(200)}
    assert len(children) > 10
    assert {bound.cost(child) for child in children} == {bound.cost(parent)}


def test_a_runtime_narrows_the_space():
    _, _, wide = made(levels=6, round_to=8)
    _, _, narrow = made(levels=6, round_to=8, runtime="vllm")
    assert {len(m.grid) for m in wide if m.units.kind == "kv_group"} == {2, 3}
    assert [m.grid for m in narrow if m.units.kind == "kv_group"] == [(0, 2), (0, 2)], "the first attention cannot leave"
    assert [m.grid for m in narrow if m.units.kind != "kv_group"] == [m.grid for m in wide if m.units.kind != "kv_group"]
    with pytest.raises(Problem, match="cannot open blocks of several shapes of a model of type gpt2"):
        made("gpt2", runtime="llama.cpp")


@torch.no_grad()
def test_the_search_comes_near_to_the_best_of_all_candidates(tmp_path):
    """All 729 candidates of three levels each are run; the winner is among the best hundredth of those inside the limit, on the search's own tokens."""
    torch.manual_seed(0)
    tokens = tiny.ids(16, 32)
    walk, options = Walk(folder=tmp_path), {"levels": 3, "round_to": 16, "off": False, "families": ["ffn_channel", "kv_group"]}
    chosen = {
        "target": {"block_parameters": 0.7},
        "damping": 0.01,
        "dense_target": 0.0,
        "generations": 12,
        "stages": [],
        "top_k": 300,
    }
    get_method("search").apply(tiny.model("llama"), tokens, walk=walk, **options, **chosen)
    found = json.loads(walk.files["search.json"])
    model = BlockModel.from_module(tiny.model("llama"))
    database = Database(model, restore(model, found["modules"]), tmp_path / "levels")
    pool = tokens[3::4]
    (bound,) = limits(model, database.modules, {"block_parameters": 0.7}, bits=16)
    every = [g for g in product(*(range(len(m.grid)) for m in database.modules)) if bound.cost(g) <= bound.most]
    kls = sorted(divergences(database, every, pool, teach(model, pool, 300)))
    assert found["kl"] <= kls[len(kls) // 100], (found["kl"], kls[:5])
    assert found["starts"]["knapsack"]["kl"] <= kls[len(kls) // 4]


def test_measured_levels_are_joined_along_the_error_curve():
    _, _, modules = made(off=False, families=("ffn_channel",))
    module = modules[0]
    losses = filled(module, {0: 0.8, 2: 0.2})
    assert losses[0] == 0.8
    assert losses[2] == pytest.approx(0.2)
    assert losses[-1] == 0
    assert list(losses) == sorted(losses, reverse=True)


def test_limits_out_of_reach_are_refused():
    model, _, modules = made(off=False)
    with pytest.raises(Problem, match="the least that can be is") as caught:
        limits(model, modules, {"parameters": 0.01}, bits=16)
    assert "target" in caught.value.fix
    losses = tuple((1.0,) * module.full + (0.0,) for module in modules)
    rising = tuple(tuple(map(float, range(len(module.grid)))) for module in modules)
    falling = tuple(tuple(-cost for cost in levels) for levels in rising)
    with pytest.raises(Problem, match="No sub-network"):
        solve(losses, [Limit("first", 0, rising, 0.0), Limit("second", 0, falling, -1.0)])


RECIPE = """
calibration: {text: [TEXT], sequences: 16, length: 32}
dtype: float32
steps:
  - method: search
    target: {block_parameters: 0.7}
    levels: 6
    round_to: 8
    generations: 4
    offspring: 4
    stages: [[64, 2]]
    top_k: 64
    nested: true
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(tiny.prose(1, 4000))
    return file


@pytest.fixture(scope="module")
def searched(texts, tmp_path_factory):
    place = tmp_path_factory.mktemp("search")
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.replace("TEXT", str(texts)))
    folder = tiny.save("llama", place / "llama")
    duramen.run(str(recipe), str(folder), place / "out")
    return place, recipe, folder


def test_a_whole_run_is_inside_its_limit_and_opens(searched):
    place, *_ = searched
    found = json.loads((place / "out" / "search.json").read_text())
    costs = found["costs"]["block_parameters"]
    assert costs["winner"] <= costs["most"] == pytest.approx(0.7 * costs["dense"])
    assert costs["winner"] > 0.9 * costs["most"]
    steps = found["generations"]
    kls = [min(start["kl"] for start in found["starts"].values()), *(step["kl"] for step in steps)]
    assert kls == sorted(kls, reverse=True), "on fixed tokens the best so far never gets worse"
    assert found["kl"] == kls[-1]
    results = duramen.api.load_results(place / "out")
    assert results["steps"][0]["reopened"]["how"] == "plain transformers, whole"
    shape = results["steps"][0]["shape"]["parameters"]
    outside = 259 * 32 * 2 + 32
    assert shape["after"] - outside == costs["winner"]


def test_killed_it_ends_with_the_same_bytes(searched, tmp_path):
    place, recipe, folder = searched
    slow = (
        "import sys, time; import duramen; from duramen import rundir; write = rundir.write_json\n"
        "def wait(*a, **k): write(*a, **k); time.sleep(0.15)\n"
        "rundir.write_json = wait; import duramen.search.database as d; d.write_json = wait; duramen.run(*sys.argv[1:])"
    )
    again, state = tmp_path / "out", tmp_path / "out" / ".duramen"
    for target in ("levels/block-0001.json", "alone.json", "generation-0001.json"):
        worker = subprocess.Popen([sys.executable, "-c", slow, str(recipe), str(folder), str(again)], stderr=subprocess.DEVNULL)
        while worker.poll() is None and not list(state.glob(f"*/{target}")):
            time.sleep(0.01)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert not (again / "manifest.json").is_file()
    duramen.run(str(recipe), str(folder), again)
    names = sorted(
        f.name
        for f in again.iterdir()
        if f.suffix in (".safetensors", ".json") and f.name not in ("manifest.json", "results.json")
    )
    assert "search.json" in names
    for name in names:
        assert (again / name).read_bytes() == (place / "out" / name).read_bytes(), name


def test_workers_end_with_the_same_bytes(searched, tmp_path):
    place, recipe, folder = searched
    line = [sys.executable, "-m", "duramen", "run", recipe, folder, tmp_path / "out", "--workers", "2"]
    subprocess.run(line, check=True, capture_output=True)
    for name in ("search.json", "nested.safetensors", "model-00002-of-00004.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (place / "out" / name).read_bytes(), name


def test_workers_without_candidates_or_a_folder_are_refused(searched, tmp_path):
    _, _, folder = searched
    recipe = {
        "calibration": {"text": ["squad"], "sequences": 4, "length": 32},
        "steps": [{"method": "magnitude", "sparsity": 0.5}],
    }
    with pytest.raises(Problem, match="nothing to do"):
        duramen.run(recipe, str(folder), tmp_path / "out", workers=2)
    with pytest.raises(Problem, match="only in memory"):
        get_method("search").apply(
            tiny.model("llama"), tiny.ids(16, 32), walk=Walk(workers=2), target={"parameters": 0.8}, **SMALL
        )


def test_another_point_of_the_front_is_made_from_the_file(searched, tmp_path):
    place, recipe, folder = searched
    found = json.loads((place / "out" / "search.json").read_text())
    assert [point["share"] for point in found["front"]] == sorted(point["share"] for point in found["front"])
    chosen = tmp_path / "point.yaml"
    text = recipe.read_text().split("steps:")[0]
    chosen.write_text(f"{text}steps:\n  - {{method: subnet, search: {place / 'out' / 'search.json'}, point: 0}}\n")
    duramen.run(str(chosen), str(folder), tmp_path / "out")
    shape = duramen.api.load_results(tmp_path / "out")["steps"][0]["shape"]["parameters"]
    costs = found["costs"]["block_parameters"]
    assert shape["after"] - (259 * 32 * 2 + 32) == pytest.approx(found["front"][0]["share"] * costs["dense"])
    chosen.write_text(chosen.read_text().replace("point: 0", "point: 99"))
    with pytest.raises(Problem, match="point 99 is wanted"):
        duramen.run(str(chosen), str(folder), tmp_path / "other")
    with pytest.raises(Problem, match="is of another model"):
        get_method("subnet").apply(tiny.model("qwen2"), tiny.ids(), search=str(place / "out" / "search.json"), point=0)
    with pytest.raises(Problem, match="is no finished search"):
        get_method("subnet").apply(tiny.model("llama"), tiny.ids(), search=str(recipe), point=0)


def test_every_point_opens_from_the_nested_file_as_from_its_folder(searched, tmp_path):
    place, recipe, folder = searched
    file = place / "out" / "nested.safetensors"
    front = json.loads((place / "out" / "search.json").read_text())["front"]
    assert len(front) >= 3
    text = recipe.read_text().split("steps:")[0]
    for point in range(len(front)):
        chosen = tmp_path / "point.yaml"
        chosen.write_text(f"{text}steps:\n  - {{method: subnet, search: {file}, point: {point}}}\n")
        duramen.run(str(chosen), str(folder), tmp_path / f"out-{point}")
        register_own("duramen_llama")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{point}").state_dict()
        opened = open_nested(file, point).state_dict()
        assert saved.keys() == opened.keys()
        for name, tensor in saved.items():
            assert torch.equal(tensor, opened[name]), name
    assert len({json.dumps(point["levels"]) for point in front}) == len(front)
    with pytest.raises(Problem, match="point 99 is wanted"):
        open_nested(file, 99)
    with pytest.raises(Problem, match="is no finished search"):
        open_nested(place / "llama" / "model.safetensors", 0)


@pytest.mark.parametrize("name", ["gemma3_text", "opt", "gpt2", "gpt_neox", "bloom", "phi3"])
@torch.no_grad()
def test_the_nested_file_of_every_family_holds_the_candidates(name, tmp_path):
    database, tokens = built(tmp_path, name)
    genomes = genomes_of(database.modules, 3, seed=7)
    report = {
        "base": digest(database.model),
        "modules": describe(database.modules),
        "front": [{"levels": list(g)} for g in genomes],
    }
    write_nested(tmp_path / "nested.safetensors", database, report)
    for point, genome in enumerate(genomes):
        with standing_for(database, genome):
            expected = database.model.network(tokens[:2]).logits
        torch.testing.assert_close(
            open_nested(tmp_path / "nested.safetensors", point)(tokens[:2]).logits, expected, rtol=1e-4, atol=1e-5
        )


def test_in_memory_and_with_a_dense_target(tmp_path):
    network, walk = tiny.model("qwen2"), Walk()
    options = {"target": {"macs": 0.75, "kv_bytes": 0.8}, "generations": 2, "offspring": 2, "stages": [], "top_k": 32}
    get_method("search").apply(
        network, tiny.ids(16, 32), walk=walk, **SMALL | options | {"dense_target": 0.5, "damping": "held-out"}
    )
    made_by = walk.reshape.plan.made_by
    assert made_by["costs"]["macs"]["winner"] <= made_by["costs"]["macs"]["most"]
    assert made_by["costs"]["kv_bytes"]["winner"] <= made_by["costs"]["kv_bytes"]["most"]


def test_what_would_undo_a_search_is_refused(tmp_path):
    with pytest.raises(ValueError, match="undoes a search"):
        get_method("search").apply(tiny.model("llama"), tiny.ids(16, 32), target={"parameters": 0.8}, homogenise=True)
    with pytest.raises(Problem, match="no folder for a nested"):
        get_method("search").apply(tiny.model("llama"), tiny.ids(16, 32), target={"parameters": 0.8}, nested=True, **SMALL)
    (tmp_path / "nested.safetensors").write_bytes(b"no such file at all")
    with pytest.raises(Problem, match="is no finished search"):
        open_nested(tmp_path / "nested.safetensors", 0)


def test_too_few_sequences_are_refused():
    with pytest.raises(Problem, match="leave none to set apart"):
        get_method("search").apply(tiny.model("llama"), tiny.ids(3, 32), target={"parameters": 0.8}, round_to=8)
