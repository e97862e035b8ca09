"""Pretraining: order, schedule, packing, growth, width, operations; documents apart, processes alike, checkpoints that survive."""

import errno
import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

import tiny
from duramen.families.model import BlockModel
from duramen.families.norms import last_norm
from duramen.problem import Problem
from duramen.train import checkpoint, extend, grow, pretrain, width
from duramen.train.checkpoint import Checkpoints
from duramen.train.data import Rows, pack
from duramen.train.folder import open_causal
from duramen.train.forecast import forecast_pretraining
from duramen.train.objective import surprise
from duramen.train.order import sample_index
from duramen.train.schedule import Schedule
from duramen.train.stage import Stage
from duramen.train.text import Corpus, Packed, make_plan, read_corpus
from duramen.train.throughput import flops_per_token, mean_keys
from duramen.train.tokenizer import Shard, learn, read_shard, write_tokens

MODEL = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("count", [*range(1, 65), 100, 255, 256, 257, 1000, 2000])
def test_every_row_comes_once_an_epoch(count):
    assert sorted(sample_index(3, 1, place, count) for place in range(count)) == list(range(count))


def test_orders_differ_by_epoch_and_seed_and_stay_the_same():
    orders = [[sample_index(seed, epoch, place, 500) for place in range(500)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(a != b for a, b in combinations(orders, 2))
    assert orders[0][:6] == [sample_index(0, 0, place, 500) for place in range(6)]
    near = [abs(a - b) for a, b in pairwise(orders[0])]
    assert np.mean(near) == pytest.approx(500 / 3, rel=0.1), "neighbours are as far apart as by chance"


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd"])
def test_the_rate_ends_at_its_floor(shape):
    schedule = Schedule(100, warmup=0.1, shape=shape, floor=0.1, decay=0.2)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[9] == 1
    assert schedule.rate(100) == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    if shape == "cosine":
        assert schedule.rate(55) == pytest.approx(0.1 + 0.9 * 0.5)
    if shape == "wsd":
        assert set(rates[9:80]) == {1.0}
        assert rates[85] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.25)))


def test_surprise_has_the_gradient_of_what_it_is():
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 11, (3, 5))
    found, size = surprise(logits, tokens)
    torch.testing.assert_close(size, logits.logsumexp(-1))
    torch.testing.assert_close(
        found, torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(3, 5)
    )
    assert torch.autograd.gradcheck(lambda logits: surprise(logits, tokens), logits)


def corpus(lengths, room, shared=True):
    generator = np.random.default_rng(0)
    tokens = [generator.integers(5, 250, size=length).astype(np.uint16) for length in lengths]
    ends = np.cumsum(lengths)
    shard = Shard(np.concatenate(tokens), ends, np.zeros(len(lengths), dtype=int), ["one"])
    pieces = [(0, end - length, end, True) for length, end in zip(lengths, ends, strict=True)]
    rows = pack(lengths, room) if shared else [[number] for number in range(len(lengths))]
    return Corpus([shard], {"one": Packed(np.array(pieces), rows, room)}, room, filler=0), tokens


def test_packed_documents_do_not_see_each_other():
    network = tiny.model("llama").double()
    found, documents = corpus([9, 14, 5, 20, 7], 32)
    plan = make_plan(found, len(found.packed["one"].rows), {}, 0)

    def task(rows):
        return pretrain.NextToken(network, plan, rows, 0.1, torch.float32, 4, apart=True)

    whole = task(found.rows([("one", number) for number in range(plan.rows)]))
    likelihood, size = whole.terms(whole.aside)
    (likelihood.sum() + size.square().sum()).backward()
    packed = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    total = 0.0
    for document in documents:
        tokens = torch.tensor(document.astype(int))[None]
        alone = Rows.whole(tokens)
        each, large = pretrain.NextToken(network, plan, alone, 0.1, torch.float32, 4, apart=False).terms(alone)
        (each.sum() + large.square().sum()).backward()
        total += float(each.detach().sum())
    assert float(likelihood.detach().sum()) == pytest.approx(total, rel=1e-5)
    for together, parameter in zip(packed, network.parameters(), strict=True):
        torch.testing.assert_close(together, parameter.grad, rtol=1e-4, atol=1e-5)
    for other in (1, 77):
        rows = found.rows([("one", number) for number in range(plan.rows)])
        filled = torch.where((rows.learned.cumsum(1) >= rows.learned.sum(1, keepdim=True)) & ~rows.learned, other, rows.tokens)
        torch.testing.assert_close(whole.terms(Rows(filled, rows.learned, rows.places))[0], likelihood)


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_at_most_half_more_than_the_best(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 11, size=generator.integers(1, 8)).tolist()

    def fits(count):
        def place(rest, rooms):
            if not rest:
                return True
            tried = set()
            for number, room in enumerate(rooms):
                if room >= rest[0] and room not in tried:
                    tried.add(room)
                    if place(rest[1:], [*rooms[:number], room - rest[0], *rooms[number + 1 :]]):
                        return True
            return False

        return place(sorted(lengths, reverse=True), [10] * count)

    best = next(count for count in range(1, len(lengths) + 1) if fits(count))
    rows = pack(lengths, 10)
    assert len(rows) <= 1.5 * best
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 10 for row in rows)


def test_a_mixture_is_kept_to_the_row():
    found, _ = corpus([10] * 30, 10)
    two = Corpus(
        found.shards,
        {"a": found.packed["one"], "b": Packed(found.packed["one"].pieces, found.packed["one"].rows[:5], 10)},
        10,
        0,
    )
    plan = make_plan(two, 24, {"a": 0.75, "b": 0.25}, 0)
    seen = Counter(plan.place(number) for number in range(24))
    assert plan.counts == {"a": 18, "b": 6}
    assert (
        sum(count for (source, _), count in seen.items() if source == "a") == len([key for key in seen if key[0] == "a"]) == 18
    )
    assert {row for source, row in seen if source == "b"} == set(range(5)), "every row once before any twice"
    expected = Counter()
    for source, row in map(plan.place, range(24)):
        expected[source] += two.targets(source, row)
    assert plan.targets() == expected
    natural = make_plan(two, 35, {}, 0)
    assert natural.counts == {"a": 30, "b": 5}
    with pytest.raises(Problem, match="no mixture"):
        make_plan(two, 24, {"a": 0.75, "b": 0.2}, 0)
    with pytest.raises(Problem, match=r"seen 12\.0 times"):
        make_plan(two, 80, {"a": 0.25, "b": 0.75}, 0)


@pytest.mark.parametrize(("length", "window"), [(7, None), (7, 3), (7, 7), (7, 20), (1, 1), (64, 5)])
def test_keys_of_a_window_are_counted_right(length, window):
    seen = [min(place + 1, window or length) for place in range(length)]
    assert mean_keys(length, convention="causal", window=window) == pytest.approx(sum(seen) / length)


def test_operations_are_those_that_torch_counts():
    config = AutoConfig.for_model(**MODEL, vocab_size=128, tie_word_embeddings=True)
    network = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tokens = torch.randint(0, 128, (1, 48))
    with FlopCounterMode(display=False) as counter:
        network(tokens).logits.sum().backward()
    assert counter.get_total_flops() == flops_per_token(network, 48) * 48


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "gpt_neox"])
def test_growth_changes_nothing_at_first(name):
    network = tiny.model(name)
    deep, new = grow.grow(network, network.config.num_hidden_layers, 1)
    tokens = tiny.ids(2, 20)
    assert deep.config.num_hidden_layers == 2 * network.config.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(deep(tokens).logits, network(tokens).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(deep.generate(tokens, **options), network.generate(tokens, **options))
    deep(tokens, labels=tokens).loss.backward()
    moved = {
        each for each, parameter in deep.named_parameters() if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    inside = grow.BlockModel.of(deep)
    adding = {each for each, (role, block) in inside.layer_names().items() if block in new and role in grow.ADDING}
    for each, _ in deep.named_parameters():
        part, _, leaf = each.rpartition(".")
        number = each.removeprefix(f"{inside.family.blocks}.").split(".")[0]
        if each.startswith(inside.family.blocks) and int(number) in new:
            assert (each in moved) == (part in adding), each
            assert leaf


def test_growth_needs_equal_groups():
    with pytest.raises(Problem, match="3 blocks cannot be divided into 2"):
        grow.grow(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL | {"num_hidden_layers": 3}, vocab_size=64)), 2, 1
        )


def test_rates_carry_over_to_other_widths():
    """Coordinate check (arXiv 2203.03466, appendix D): in a few steps a wider model's stream changes as much as a narrow one's."""
    sizes, moved = (64, 256), {}
    for carried, size in product((True, False), sizes):
        torch.manual_seed(0)
        wide = {
            "hidden_size": size,
            "num_attention_heads": size // 16,
            "num_key_value_heads": size // 16,
            "intermediate_size": 2 * size,
        }
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL | wide, vocab_size=64, initializer_range=0.1))
        if carried:
            width.widen(network, 64)
        named = width.groups(network, 0.003, width.shares(network, 64 if carried else 0))
        optimizer, tokens = (
            torch.optim.AdamW([{key: group[key] for key in ("params", "lr")} for group in named]),
            tiny.ids(4, 32) % 64,
        )
        before = network(tokens, output_hidden_states=True).hidden_states[1]
        for _ in range(3):
            network(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = network(tokens, output_hidden_states=True).hidden_states[1]
        moved[carried, size] = float((after - before).detach().pow(2).mean().sqrt())
    slopes = {carried: math.log(moved[carried, sizes[1]] / moved[carried, sizes[0]]) / math.log(4) for carried in (True, False)}
    assert abs(slopes[True]) < 0.1, slopes
    assert slopes[False] > 0.5, slopes


def test_a_wide_model_is_an_ordinary_one():
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODEL, vocab_size=64)
    network = AutoModelForCausalLM.from_config(config)
    tokens = tiny.ids(1, 12) % 64
    plain = network(tokens).logits
    network.model.norm.weight.data.div_(4)
    torch.testing.assert_close(network(tokens).logits, plain / 4)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3_text", "gpt2", "bloom", "opt", "gpt_neox", "mamba"])
@torch.no_grad()
def test_logits_are_divided_by_the_norm_before_the_head(name):
    """Whatever its kind: about zero in Gemma, with a bias in GPT-2; the norm behind Bloom's embedding is another."""
    network, tokens = tiny.model(name), tiny.ids(1, 12)
    norm = network.get_submodule(last_norm(BlockModel.of(network)))
    kept = {key: parameter.clone() for key, parameter in norm.named_parameters()}
    width.widen(network, network.config.hidden_size // 4)
    wide = network(tokens).logits
    for key, parameter in norm.named_parameters():
        parameter.copy_(kept[key])
    torch.testing.assert_close(wide, network(tokens).logits / 4)
    taken = width.shares(network, network.config.hidden_size // 4)
    vectors = [each for each, share in taken.items() if share == 0.25 and network.get_parameter(each).ndim == 1]
    assert {id(network.get_parameter(each)) for each in vectors} == {id(parameter) for parameter in norm.parameters()}
    assert set(width.shares(network, 0).values()) == {1.0}


@pytest.fixture
def texts_as_tokens(tmp_path):
    """A stage's tokenizer and tokens of made-up prose from two sources."""
    from transformers import PreTrainedTokenizerFast

    documents = {name: [tiny.prose(10 * seed + len(name), 90) for seed in range(40)] for name in ("one", "three")}
    rows = [{"text": text, "metadata": {"source": name}} for name, texts in documents.items() for text in texts]
    inner = learn(iter(row["text"] for row in rows), 320)
    spoken = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|pad|>")
    spoken.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokens").mkdir()
    for split, part in (("train", rows[::2]), ("held_out", rows[1::2])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        write_tokens(tmp_path / "tokens" / f"{split}-0.safetensors", tmp_path / f"{split}.jsonl", spoken)
    return {"tokens": tmp_path / "tokens", "tokenizer": tmp_path / "tokenizer"}


def settings(**more):
    return pretrain.Settings(
        **{"model": MODEL, "context": 48, "steps": 24, "batch": 6, "at_once": 3, "every": 6, "held_out_rows": 8} | more
    )


def test_pretraining_learns_and_says_what_it_saw(texts_as_tokens, tmp_path):
    stage = Stage(tmp_path / "stage", texts_as_tokens, 0)
    stage.folder.mkdir()
    found = pretrain.apply(stage, settings(milestones=12))
    assert found["held_out"][-1][1] < found["held_out"][0][1] - 0.5
    assert found["held_out"][0][1] == pytest.approx(math.log(320), abs=0.3)
    assert found["last_rate"] == Schedule(24, warmup=0.05, shape="wsd").rate(23)
    lines = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["loss"] for line in lines] == found["losses"]
    corpus = read_corpus(texts_as_tokens["tokens"], "train", 48, 0, shared=True)
    whole = sum(shard.counts()["one"] for shard in corpus.shards)
    assert found["sources"]["one"] <= whole * 4
    kept = sorted(file.name for file in (stage.folder / "checkpoints").iterdir())
    assert kept == ["step-00000012", "step-00000018", "step-00000024"], "the last two and the milestones"
    again = open_causal(stage.folder / "model")
    assert again.config.num_hidden_layers == 2
    rows = pretrain.first_rows(read_corpus(texts_as_tokens["tokens"], "held_out", 48, 1, shared=True), 8)
    plan = make_plan(corpus, 1, {}, 0)
    assert pretrain.NextToken(again, plan, rows, 0, torch.float32, 8, apart=True).held_out()["loss"] == pytest.approx(
        found["held_out"][-1][1], rel=1e-5
    )


PROCESSES = """
import json, sys
from pathlib import Path
from duramen.calibrate import ranks
from duramen.train import loop, pretrain
from duramen.train.stage import Stage

out, given, values, stop = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
step = loop._Run.step

def stopped(self, number):
    if number == stop:
        import os
        self.checkpoints.wait()
        os._exit(9)
    step(self, number)

loop._Run.step = stopped
with ranks.joined():
    if ranks.leads():
        out.mkdir(exist_ok=True)
    ranks.wait()
    pretrain.apply(Stage(out, {name: Path(place) for name, place in given.items()}, 0), pretrain.Settings(**values))
"""


def processes(count, out, given, values, stop=-1):
    """Runs a pretraining by so many processes; whether it ended well."""
    words = (
        ["-c", PROCESSES]
        if count == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(out.parent / "run.py")]
    )
    (out.parent / "run.py").write_text(PROCESSES)
    places = json.dumps({name: str(place) for name, place in given.items()})
    line = [sys.executable, *words, str(out), places, json.dumps(values), str(stop)]
    return subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240).returncode == 0


def test_two_processes_train_the_model_of_one_and_one_goes_on_from_theirs(texts_as_tokens, tmp_path):
    from safetensors.torch import load_file

    values = settings(steps=12).model_dump(mode="json")
    stage = Stage(tmp_path / "one", texts_as_tokens, 0)
    stage.folder.mkdir()
    one = pretrain.apply(stage, settings(steps=12))
    assert not processes(2, tmp_path / "two", texts_as_tokens, values, stop=8), "a process died"
    assert [file.name for file in (tmp_path / "two" / "checkpoints").glob("step-*[0-9]")] == ["step-00000006"]
    two = pretrain.apply(Stage(tmp_path / "two", texts_as_tokens, 0), settings(steps=12))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, tensor in load_file(tmp_path / "one" / "model" / "model.safetensors").items():
        torch.testing.assert_close(
            load_file(tmp_path / "two" / "model" / "model.safetensors")[name], tensor, rtol=1e-3, atol=2e-5
        )


@pytest.fixture
def checkpoints(tmp_path):
    said = []
    kept = Checkpoints(tmp_path, keep=2, tell=said.append)
    for step in (1, 2, 3):
        kept.save(step, {"weight": torch.full((3,), float(step)), "count": torch.tensor(step)}, {"losses": [0.1] * step})
    kept.wait()
    return kept, tmp_path / "checkpoints", said


def blank():
    return {"weight": torch.zeros(3), "count": torch.tensor(0)}


def test_the_newest_whole_checkpoint_is_taken(checkpoints):
    kept, folder, said = checkpoints
    assert sorted(file.name for file in folder.iterdir()) == ["step-00000002", "step-00000003"]
    state = blank()
    assert kept.restore(lambda: state) == (3, {"losses": [0.1] * 3})
    assert state["weight"].tolist() == [3] * 3
    assert int(state["count"]) == 3
    file = folder / "step-00000003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    (folder / "step-00000004.partial").mkdir()
    assert kept.restore(lambda: state)[0] == 2
    assert state["weight"].tolist() == [2] * 3
    assert "step-00000003 is damaged (model.safetensors was changed)" in said[0]
    assert not (folder / "step-00000004.partial").exists()
    (folder / "step-00000002" / "facts.json").unlink()
    with pytest.raises(Problem, match="None of the 2 checkpoints"):
        kept.restore(lambda: state)


def test_a_full_disk_leaves_the_checkpoint_before(checkpoints, monkeypatch):
    kept, folder, _ = checkpoints

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    kept.save(4, blank(), {})
    with pytest.raises(Problem, match="No space left"):
        kept.wait()
    monkeypatch.undo()
    assert sorted(file.name for file in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert kept.restore(blank)[0] == 3


def test_a_checkpoint_of_another_model_is_refused(checkpoints):
    with pytest.raises(Problem, match="does not fit"):
        checkpoints[0].restore(lambda: {"weight": torch.zeros(4), "count": torch.tensor(0)})


def test_a_longer_context_is_shown_by_place(texts_as_tokens, tmp_path):
    first = Stage(tmp_path / "first", texts_as_tokens, 0)
    first.folder.mkdir()
    pretrain.apply(first, settings(steps=6, model=MODEL | {"max_position_embeddings": 48}))
    stage = Stage(tmp_path / "longer", texts_as_tokens | {"model": first.folder / "model"}, 0)
    stage.folder.mkdir()
    values = {"context": 96, "steps": 6, "batch": 4, "at_once": 4, "every": 3, "rope_theta": 50_000, "held_out_rows": 6}
    found = extend.apply(stage, extend.Settings(**values))
    assert len(found["by_place"]["before"]) == len(found["by_place"]["after"]) == extend.STRETCHES
    assert np.mean(found["by_place"]["after"]) < np.mean(found["by_place"]["before"])
    config = open_causal(stage.folder / "model").config
    assert config.max_position_embeddings == 96
    assert config.rope_parameters["rope_theta"] == 50_000
    with pytest.raises(Problem, match="No held-out document has 4096"):
        extend.apply(stage, extend.Settings(context=4096))


def test_the_base_is_that_of_layers_that_see_the_whole_row():
    assert extend.slower({"rope_type": "default", "rope_theta": 1e4}, 1e6) == {"rope_type": "default", "rope_theta": 1e6}
    gemma3 = Gemma3TextConfig(
        hidden_size=16, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=16, vocab_size=16
    )  # fmt: skip
    before = dict(gemma3.rope_parameters)
    network = extend.turned(AutoModelForCausalLM.from_config(gemma3), extend.Settings(context=64, rope_theta=5e6))
    assert network.config.rope_parameters["full_attention"]["rope_theta"] == 5e6
    assert network.config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    assert torch.isfinite(network(torch.arange(16)[None]).logits).all()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"model_type": "lama"}, "no configuration"),
        (MODEL | {"hidden": 3}, "has no `hidden`"),
        (MODEL | {"vocab_size": 100}, "an embedding of 100"),
    ],
)
def test_models_that_cannot_be(texts_as_tokens, tmp_path, model, words):
    with pytest.raises(Problem, match=words):
        pretrain.apply(Stage(tmp_path, texts_as_tokens, 0), settings(model=model))


def test_only_new_blocks_learn_when_asked(texts_as_tokens, tmp_path):
    first = Stage(tmp_path / "first", texts_as_tokens, 0)
    first.folder.mkdir()
    pretrain.apply(first, settings(steps=2, every=2))
    with pytest.raises(Problem, match="no new blocks"):
        pretrain.apply(
            Stage(tmp_path / "x", texts_as_tokens | {"model": first.folder / "model"}, 0), settings(model={}, only="new")
        )
    grown = Stage(tmp_path / "grown", texts_as_tokens | {"model": first.folder / "model"}, 0)
    grown.folder.mkdir()
    assert grow.apply(grown, grow.Settings(groups=2))["largest_difference"] == 0
    last = Stage(tmp_path / "last", texts_as_tokens | {"model": grown.folder / "model"}, 0)
    last.folder.mkdir()
    pretrain.apply(last, settings(model={}, only="new", steps=3, every=3))
    before, after = open_causal(grown.folder / "model").state_dict(), open_causal(last.folder / "model").state_dict()
    changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1", "3"}


def test_moxin_is_as_large_as_its_report_says():
    from duramen.recipe import load_recipe

    steps = {step.id: step for step in load_recipe("moxin-7b").resolved()}
    found = forecast_pretraining(steps["phase-1"].settings, steps["tokenize"].settings.vocabulary)
    assert found["parameters"] == pytest.approx(8.114e9, rel=1e-3)
    totals = [found["bytes"][ranks]["total"] for ranks in ("8", "64", "256")]
    assert totals == sorted(totals, reverse=True)
    assert found["bytes"]["64"]["share"] == 16 * found["parameters"] // 64


def test_moxin_s_first_steps_at_a_small_width(texts_as_tokens, tmp_path):
    from duramen.recipe import load_recipe

    real = next(step.settings for step in load_recipe("moxin-7b").resolved() if step.id == "phase-1")
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 64,
        "sliding_window": 16,
    }
    change = {
        "model": real.model | small,
        "context": 48,
        "steps": 12,
        "batch": 4,
        "at_once": 2,
        "every": 6,
        "compile": False,
        "dtype": "float32",
        "epochs": 4,
    }
    stage = Stage(tmp_path / "moxin", texts_as_tokens, 0)
    stage.folder.mkdir()
    found = pretrain.apply(stage, pretrain.Settings(**real.model_dump() | change))
    assert found["held_out"][-1][1] < found["held_out"][0][1]
    assert Path(stage.folder / "model" / "config.json").is_file()
    assert read_shard(next(texts_as_tokens["tokens"].glob("train-*"))).names == ["one", "three"]
