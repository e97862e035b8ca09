"""The step that shortens prompts: what it saves and opens again, what it costs, and what an evaluation makes of it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import duramen
import tiny
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.opening import load, open_blocks
from duramen.problem import Problem
from duramen.tokens.cost import costs
from duramen.tokens.folder import FILE, ReducedModel
from duramen.tokens.model import Reduced, Reduction, continuation_losses
from duramen.tokens.reduction import apply
from duramen.tokens.schedule import Costs, solve_keep

CLOSE = {"rtol": 1e-4, "atol": 5e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("mamba2", "bamba", "llama"):
        tiny.save(name, root / name)
    return root


def step(**more):
    return {"method": "token_reduction", "cut": 0.3, "length": 64, "sequences": 6, **more}


def recipe(texts, *steps):
    measured = {
        "method": "evaluate", "text": [str(texts[1])], "length": 64, "context": 40, "windows": 4, "prompts": ["ab"], "new_tokens": 4,
    }  # fmt: skip
    calibration = {"text": [str(texts[0])], "sequences": 8, "length": 64}
    return {"name": "tiny", "dtype": "float32", "calibration": calibration, "steps": [*steps, measured]}


@pytest.fixture(scope="module")
def finished(folders, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, duramen.run(recipe(texts, step(choose=False, sites=[0])), str(folders / "mamba2"), out)


@torch.no_grad()
def test_the_folder_is_the_dense_model_for_transformers_and_the_shorter_one_for_us(finished, folders):
    out, results = finished
    tokens = tiny.ids(2, 40)
    dense, stock = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (folders / "mamba2", out))
    assert torch.equal(stock(tokens).logits, dense(tokens).logits)
    found = load(out)
    shorter = found(tokens).logits
    assert shorter.shape[1] < 40
    reduction = Reduction.model_validate_json((out / FILE).read_text())
    assert reduction.sites == (0,)
    assert reduction.model_dump(mode="json") == results["steps"][0]["reduction"]["reduction"]
    with Reduced(dense, reduction):
        assert torch.equal(dense(tokens).logits, shorter)
    assert duramen.load is load
    assert not hasattr(load(folders / "mamba2"), "reduced")


def test_what_was_measured_is_what_follows_a_shortened_context(finished, texts):
    out, results = finished
    found = results["evaluations"][0]["perplexity"][texts[1].stem]
    assert found["context"] == 40
    assert found["kl"]["value"] > 1e-3
    report = (out / "report.html").read_text()
    assert "what leaves a prompt" in report
    assert (
        report.count('class="leaves"')
        == sum(after is not None for after in results["steps"][0]["reduction"]["sample"]["left_after"])
        > 0
    )
    assert "zeros in ordinary tensors" not in report
    card = (out / "README.md").read_text()
    assert "duramen.load" in card
    assert "weights removed" not in card


@pytest.mark.parametrize("name", ["mamba2", "bamba"])
@torch.no_grad()
def test_block_by_block_is_the_whole_model(folders, name):
    """Batches of different lengths, interleaved as the blocks are walked; their losses are those of the network as a whole."""
    reduction = Reduction(kind="utrc", cut=0.3, sites=(0,))
    network, batches = tiny.model(name), [tiny.ids(2, 40), tiny.ids(1, 28)]
    model = ReducedModel(BlockModel.from_folder(folders / name), reduction)
    hidden = model.last_hidden(batches, [[30, 30], [20]])
    for batch, state, start in zip(batches, hidden, (30, 20), strict=True):
        assert state[:, : start - 4].isnan().any()
        logs = model.logits(state[:, start - 1 : -1]).log_softmax(-1)
        found = -logs.gather(2, batch[:, start:, None])[..., 0]
        with Reduced(network, reduction) as reduced:
            torch.testing.assert_close(found, continuation_losses(network, reduced, batch, start), **CLOSE)


def test_the_choice_is_by_losses_and_what_was_given_stays_unless_another_is_clearly_better(folders, monkeypatch):
    losses = iter([[1.0, 2.0, 3.0], [0.99, 2.02, 2.97], [0.5, 1.4, 2.6], [0.4, 1.45, 2.6], [0.3, 1.2, 2.4]])
    monkeypatch.setattr("duramen.tokens.reduction._losses", lambda *_: next(losses))
    model, walk = BlockModel.from_folder(folders / "mamba2"), Walk()
    found = apply(model, tiny.ids(8, 64), walk=walk, cut=0.2, length=64)
    assert [each["reduction"]["sites"] for each in found["tried"]] == [[0, 1], [1], [0, 1], [0, 1], [0, 1]]
    assert [(each["reduction"]["gap_step"], each["reduction"]["aligned"]) for each in found["tried"][2:]] == [
        ("hold", True), ("bias", False), ("bias", True),
    ]  # fmt: skip
    assert found["reduction"] == found["tried"][4]["reduction"], "the fourth is no better than the third, the fifth is"
    assert json.loads(walk.files[FILE]) == found["reduction"]


@pytest.mark.parametrize("unit", ["tokens", "macs", "seconds"])
def test_as_much_is_saved_as_was_asked_for_by_each_way_of_counting(folders, unit):
    found = apply(
        BlockModel.from_folder(folders / "mamba2"),
        tiny.ids(8, 64),
        cut=0.2,
        cut_of=unit,
        length=512,
        choose=False,
        kind="prune",
    )
    assert found["saved"] == pytest.approx(0.2, abs=1e-6)
    assert found["tokens"] < (1 if unit == "seconds" else 0.9)
    dense, reduced = found["costs"]["dense"], found["costs"]["reduced"]
    assert all(after <= before * 1.5 for before, after in zip(dense[1:], reduced[1:], strict=True))


def test_multiply_adds_by_hand(folders):
    """32 wide, inner 64, 4 heads, one group of 8 states, chunks of 64; 259 tokens; in bamba also attention and a gated MLP."""
    scan, projections = 64 * (8 + 64) + 2 * 64 * 8, 32 * (2 * 64 + 2 * 8 + 4) + (64 + 16) * 4 + 64 * 32
    found = costs("macs", BlockModel.from_folder(folders / "mamba2"), 100, matches=True, window=16)
    assert [layer(10) for layer in found.layers] == [10 * (scan + projections)] * 3
    assert found.outside == 32 * 259
    assert found.site(20) == 10 * 10 * 32
    assert found.site(100) == 50 * 16 * 32
    hybrid = costs("macs", BlockModel.from_folder(folders / "bamba"), 100, matches=False, window=None)
    assert hybrid.site(100) == 0
    attention = hybrid.layers[1]
    assert attention(20) > 2 * attention(10), "attention grows with the square"
    assert hybrid.layers[0](20) == 2 * hybrid.layers[0](10)


def test_choosing_costs_too_and_too_much_of_it_saves_nothing():
    dear = Costs([float, float], site=lambda tokens: tokens)
    keep = solve_keep(Costs([float, float], site=lambda tokens: 0.1 * tokens), [0], 0.2, tokens=10)
    assert (10 + 1 + 10 * keep) / 20 == pytest.approx(0.8)
    with pytest.raises(Problem, match="at most 0% can be cut"):
        solve_keep(dear, [0], 0.1, tokens=10)


def test_inside_the_part_that_is_shortened_nothing_is_scored(finished):
    out, _ = finished
    with pytest.raises(Problem, match="no likelihood"):
        open_blocks(out).last_hidden([tiny.ids(1, 20)])


def test_a_recipe_that_would_score_a_shortened_prompt_stops_before_it_begins(folders, texts, tmp_path):
    whole = recipe(texts, step())
    del whole["steps"][1]["context"]
    with pytest.raises(Problem, match="no likelihood"):
        duramen.run(whole, str(folders / "mamba2"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_named(finished, folders, texts, tmp_path):
    out, _ = finished
    with pytest.raises(Problem, match="no state-space layers"):
        duramen.run(recipe(texts, step()), str(folders / "llama"), tmp_path / "a")
    with pytest.raises(Problem, match="leaves nothing to score"):
        duramen.run(recipe(texts, {"method": "evaluate", "length": 64, "context": 64}), str(folders / "llama"), tmp_path / "b")
    for wrong in ({"keep": [0.0], "sites": [0]}, {"keep": [0.5], "sites": [0, 1]}, {"sites": [1, 0]}, {"cut": 1.0}):
        with pytest.raises(Problem):
            duramen.run(recipe(texts, step(**wrong)), str(folders / "mamba2"), tmp_path / "c")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in out.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / FILE).write_text('{"cut": 7}')
    with pytest.raises(Problem, match="cannot be read"):
        load(copy)


@torch.no_grad()
def test_a_prompt_with_holes_a_score_that_is_not_finite_and_training_are_refused():
    network, tokens = tiny.model("mamba2"), tiny.ids(1, 30)
    with Reduced(network, Reduction(cut=0.2, sites=(0,))) as reduced:
        mask = torch.ones_like(tokens)
        mask[0, 10] = 0
        with pytest.raises(Problem, match="padding between"):
            network(tokens, attention_mask=mask)
        network.train()
        with pytest.raises(Problem, match="cannot be trained"):
            network(tokens)
        network.eval()
        network.backbone.layers[0].mixer.dt_bias.fill_(torch.nan)
        with pytest.raises(Problem, match="after layer 0 is not finite"):
            network(tokens)
    assert not reduced._undo
