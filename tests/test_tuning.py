"""Tuning on TRL: its losses are those of the papers, a stop goes on to the bit, parts of a step add up, rules judge, and bad examples are named."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

import tiny
from duramen.problem import Problem
from duramen.train import dpo, grpo, rewards, sft, tuning
from duramen.train.exercises import answered, exercise, exercises, is_held_out
from duramen.train.folder import open_causal
from duramen.train.stage import Stage
from duramen.train.tokenizer import write_tokens


@pytest.fixture(autouse=True)
def _quietly():
    with tuning.quietly():
        yield


@pytest.fixture
def stage(llama, tmp_path):
    return Stage(tmp_path / "stage", {"model": llama}, 0)


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Say {word}",
            "completion": word * (1 + number % 3),
            "chosen": word,
            "rejected": f"{word} {word}",
            "answer": word,
        }
        for number, word in enumerate(
            ["apple", "bread", "chair", "river", "stone", "cloud", "grass", "horse", "light", "money", "music", "night"] * 2
        )
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


SMALL = {"batch": 4, "at_once": 4, "every": 2, "learning_rate": 1e-3}
EXAMPLES = SMALL | {"length": 64, "held_out": 0.25}
STAGES = {
    "sft": (sft, EXAMPLES | {"epochs": 4}),
    "dpo": (dpo, EXAMPLES),
    "grpo": (grpo, SMALL | {"steps": 4, "answers": 2, "longest": 6, "reward": "near"}),
}


def applied(stage, name, data, **more):
    module, values = STAGES[name]
    stage.folder.mkdir(exist_ok=True)
    return module.apply(stage, module.Settings(data=data, **values | more))


@pytest.mark.parametrize("name", STAGES)
def test_stopped_it_goes_on_to_the_bit(name, stage, data, llama, tmp_path, monkeypatch):
    from transformers import Trainer

    whole = applied(stage, name, data)
    assert whole["steps"] >= 4
    again, honest, count = Stage(tmp_path / "again", {"model": llama}, 0), Trainer.training_step, []

    class Stopped(Exception):
        pass

    def step(self, *args, **more):
        count.append(1)
        if len(count) == 4:
            raise Stopped
        return honest(self, *args, **more)

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(Stopped):
        applied(again, name, data)
    broken = again.folder / "work" / "checkpoint-3"
    broken.mkdir()
    found = applied(again, name, data)
    assert not broken.exists(), "what was cut off is not taken"
    assert len(count) < 4 + whole["steps"], "it did not begin anew"
    assert found["losses"] == whole["losses"]
    first, second = (folder / "model" / "model.safetensors" for folder in (stage.folder, again.folder))
    assert first.read_bytes() == second.read_bytes()


def test_replay_takes_its_share_of_the_old_text(stage, llama, data, tmp_path):
    """Pieces come from all over the text, whole, and all but their first token is learned; without a text it says which stage is missing."""
    text, tokenizer = tmp_path / "text.jsonl", tiny.tokenizer()
    rows = [{"text": tiny.prose(number, 90), "metadata": {"source": "prose"}} for number in range(30)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tokens").mkdir()
    write_tokens(tmp_path / "tokens" / "train-0.safetensors", text, tokenizer)
    there = Stage(tmp_path / "with", {"model": llama, "tokens": tmp_path / "tokens"}, 0)
    chosen = sft.Settings(data=data, replay=0.5, **STAGES["sft"][1])
    pieces = sft.text_again(there, chosen, 600)
    assert sum(len(piece["input_ids"]) for piece in pieces) == pytest.approx(600, rel=0.2)
    whole = "".join(row["text"] for row in rows)
    shown = [tokenizer.decode(piece["input_ids"], skip_special_tokens=True) for piece in pieces]
    assert all(part in whole for part in shown)
    assert shown[0] in rows[0]["text"]
    assert shown[-1] in rows[-1]["text"]
    assert all(piece["labels"] == [-100, *piece["input_ids"][1:]] for piece in pieces)
    lengths = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows]
    everything = sum(length // 64 + (length % 64 > 1) for length in lengths)  # a single token has nothing to learn
    assert len(sft.text_again(there, chosen, 10**9)) == everything
    assert applied(there, "sft", data, replay=0.5)["replayed_pieces"] > 0
    with pytest.raises(Problem, match="`sft` has no tokens"):
        applied(stage, "sft", data, replay=0.5)


@pytest.mark.parametrize("name", ["sft"])
def test_parts_of_a_step_add_up_by_their_tokens(name, stage, data, llama, tmp_path):
    whole = applied(stage, name, data, packing=False)
    parts = applied(Stage(tmp_path / "parts", {"model": llama}, 0), name, data, packing=False, at_once=1)
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert parts["steps"] == whole["steps"]


def test_the_rate_falls_to_zero_in_as_many_steps_as_there_are(stage, data):
    found = applied(stage, "sft", data, packing=False, warmup=0.25)
    rates, steps = found["logged"]["learning_rate"], found["steps"]
    rise = math.ceil(0.25 * steps)
    expected = [1e-3 * (step / rise if step < rise else (steps - step) / (steps - rise)) for step in range(steps)]
    assert rates == pytest.approx(expected)


def test_packed_examples_do_not_see_each_other(stage, data, llama, tmp_path):
    """The first loss of all rows at once is the same packed or each alone."""
    alone = applied(stage, "sft", data, packing=False, batch=18, at_once=18, epochs=1)
    packed = applied(Stage(tmp_path / "packed", {"model": llama}, 0), "sft", data, packing=True, batch=32, at_once=32, epochs=1)
    assert packed["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)


def logs(network, tokens, start):
    """Log-probabilities of the tokens from ``start`` on, by hand."""
    found = network(tokens[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
    return found.gather(-1, tokens[start:, None])[:, 0]


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_preferences_are_weighed_as_the_papers_say(loss, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference, spoken = tiny.model("llama"), tiny.model("llama", seed=1), tiny.tokenizer()
    spoken.pad_token = spoken.eos_token
    rows = [
        {"prompt": "Say it", "chosen": " once", "rejected": " twice or more"},
        {"prompt": "And", "chosen": " so on", "rejected": " no"},
    ]
    config = DPOConfig(
        output_dir=str(tmp_path), loss_type=[dpo.LOSSES[loss]], beta=0.3, report_to=[], use_cpu=True, bf16=False, activation_checkpointing=False,
        disable_dropout=True, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = DPOTrainer(policy, reference, config, train_dataset=Dataset.from_list(rows), processing_class=spoken)
    batch = next(iter(trainer.get_train_dataloader()))
    found = float(trainer.compute_loss(policy, batch).detach())
    total = []
    for row in rows:
        margins = []
        for answer in (row["chosen"], row["rejected"]):
            start = len(spoken(row["prompt"])["input_ids"])
            tokens = torch.tensor([*spoken(row["prompt"] + answer)["input_ids"], spoken.eos_token_id])
            with torch.no_grad():
                ratio = logs(policy, tokens, start) - logs(reference, tokens, start)
            margins.append(ratio.sum() / (len(ratio) if loss == "length_normalised" else 1))
        total.append(float(-logsigmoid(0.3 * (margins[0] - margins[1]))))
    assert found == pytest.approx(np.mean(total), rel=1e-5)
    assert found != pytest.approx(math.log(2), abs=1e-3), "policy and reference differ"


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("variant", grpo.VARIANTS)
def test_policies_are_moved_as_the_papers_say(variant, corrected, llama, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy, spoken = open_causal(llama), tiny.tokenizer()
    spoken.pad_token = spoken.eos_token
    config = GRPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, activation_checkpointing=False, num_generations=2, max_completion_length=10,
        per_device_train_batch_size=2, beta=0.05, use_bias_correction_kl=corrected, epsilon=0.2, **grpo.VARIANTS[variant],
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "answer": "b"}] * 2)
    trainer = GRPOTrainer(
        policy, reward_funcs=[grpo.judge(rewards.exact)], args=config, train_dataset=rows, processing_class=spoken
    )
    trainer.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(0)
    prompts, answers = torch.randint(5, 200, (2, 3), generator=generator), torch.randint(5, 200, (2, 6), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        now = torch.stack(
            [logs(policy, torch.cat([prompt, answer]), 3) for prompt, answer in zip(prompts, answers, strict=True)]
        )
    old, reference = (now + 0.4 * torch.randn(2, 6, generator=generator) for _ in range(2))
    gains = torch.tensor([0.7, -0.7])
    inputs = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": answers, "completion_mask": mask, "advantages": gains,
        "old_per_token_logps": old.float(), "ref_per_token_logps": reference.float(), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    found = float(trainer._compute_loss(policy, inputs).detach())
    away = now - old
    if variant == "gspo":
        away = ((away * mask).sum(1) / mask.sum(1))[:, None].expand_as(away)
    ratio, high = away.exp(), 0.28 if variant == "dapo" else 0.2
    token = -torch.minimum(ratio * gains[:, None], ratio.clamp(0.8, 1 + high) * gains[:, None])
    back = reference - now
    token = (token + 0.05 * (ratio if corrected else 1) * (back.exp() - back - 1)) * mask
    if variant in ("grpo", "gspo"):
        expected = (token.sum(1) / mask.sum(1)).mean()
    else:
        expected = token.sum() / (mask.sum() if variant == "dapo" else 2 * 10)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_the_penalty_is_unbiased_and_pulls_the_other_way():
    """k3 = e^d − d − 1: its mean is KL(π‖π_ref), its gradient as a loss that of KL(π_ref‖π)."""
    theta = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.5, -0.4], dtype=torch.float64).log_softmax(0)
    logs = theta.log_softmax(0)
    away = reference - logs
    third = away.exp() - away - 1
    assert float(third.detach().min()) >= 0
    policy = logs.exp().detach()
    assert float((policy * third.detach()).sum()) == pytest.approx(
        float((policy * (logs.detach() - reference)).sum()), abs=1e-12
    )
    (taken,) = torch.autograd.grad((policy * third).sum(), theta, retain_graph=True)
    (other,) = torch.autograd.grad((reference.exp() * (reference - logs)).sum(), theta, retain_graph=True)
    (true,) = torch.autograd.grad((logs.exp() * (logs - reference)).sum(), theta)
    torch.testing.assert_close(taken, other, rtol=1e-12, atol=1e-12)
    assert (taken - true).abs().max() > 0.01
    logs = theta.log_softmax(0)
    away = reference - logs
    ratio = (logs - logs.detach()).exp()
    (corrected,) = torch.autograd.grad((policy * ratio * (away.exp() - away - 1)).sum(), theta)
    torch.testing.assert_close(corrected, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "answer", "expected", "worth"),
    [
        ("exact", " yes \n", "yes", 1), ("exact", "yes.", "yes", 0), ("near", "1, 2, 3.", "1, 2, 3.", 1), ("near", "1, 2", "1, 2, 3.", 0.25),
        ("near", "x", "1", 0), ("number", "so it is 1,204.50", "1204.5", 1), ("number", "none", "3", 0), ("pattern", "a-b-c", r"\w(-\w)+", 1),
        ("pattern", "abc", r"\w(-\w)+", 0),
    ],
)  # fmt: skip
def test_rules_judge(name, answer, expected, worth):
    assert rewards.REWARDS[name](answer, expected) == worth


def test_exercises_have_one_answer_and_a_miss_and_none_is_on_both_sides():
    learned = list(exercises(3000, 0, held_out=False))
    asked = list(exercises(200, 1, held_out=True))
    assert len(learned) == 3000
    assert len(asked) == 200
    assert not {each.prompt for each in learned} & {each.prompt for each in asked}
    assert all(is_held_out(each.prompt) for each in asked)
    for each in learned:
        assert each.answer != each.miss
        assert re.fullmatch(each.form, each.answer)
        if not each.prompt.startswith("Is "):
            assert not re.fullmatch(each.form, each.miss), each
    answers, draw = {}, random.Random(5)
    for each in (exercise(draw) for _ in range(5000)):
        assert answers.setdefault(each.prompt, each.answer) == each.answer


def test_answers_are_counted_with_their_interval(llama):
    found = answered(open_causal(llama), tiny.tokenizer(), 5, 0)
    assert (found["share"], found["count"]) == (0, 5)
    assert 0.3 < found["high"] < 0.6
    assert found["form"]["share"] == 0
    assert answered(None, None, 0, 0) is None


BAD = {
    "no file": ("sft", "nowhere.jsonl", {}, "no file"),
    "no json": ("dpo", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{', {}, "Line 2"),
    "no field": ("dpo", '{"prompt": "a", "chosen": "b"}', {}, "Line 1"),
    "empty answer": ("dpo", '{"prompt": "a", "chosen": "", "rejected": "c"}', {}, "Line 1"),
    "same twice": ("dpo", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 2, {}, "prefers an answer to itself"),
    "too long": (
        "sft",
        json.dumps({"prompt": "a" * 400, "completion": "b"}) + "\n",
        {"length": 16},
        "no target tokens in 1 of 1",
    ),
    "groups": ("grpo", '{"prompt": "a", "answer": "b"}\n' * 2, {"batch": 6, "at_once": 3}, "Groups of 2"),
    "parts": ("sft", '{"prompt": "a", "completion": "b"}\n' * 4, {"batch": 6, "at_once": 4}, "cannot be run 4 at once"),
    "reward": ("grpo", '{"prompt": "a", "answer": "three"}\n' * 4, {"reward": "number"}, "reward of an answer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, stage, tmp_path, monkeypatch):
    name, content, more, words = BAD[case]
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    if case == "reward":
        monkeypatch.setitem(rewards.REWARDS, "number", lambda answer, expected: float(expected))
    with pytest.raises(Problem, match=words):
        applied(stage, name, content if case == "no file" else str(file), **more)
