"""Examples to rows: what is learned, what shares a row, and that neighbours do not matter."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.train.data import Rows, keeps_apart, pack, read_rows
from duramen.train.loop import recomputed
from duramen.train.models import Course
from duramen.train.objective import NextTokens

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def written(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def learned_text(rows, tokenizer, row=0):
    return tokenizer.decode(rows.tokens[row][rows.learned[row]], skip_special_tokens=False)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_packing_takes_every_document_once_and_no_row_is_too_full(lengths):
    rows = pack(lengths, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 20 for row in rows)
    full = sorted(sum(lengths[number] for number in row) for row in rows)
    assert all(one + other > 20 for one, other in pairwise(full))  # no two rows would fit into one


def test_best_fit_fills_the_fullest_row_that_has_room():
    assert pack([5, 4, 3, 2], 7) == [[0, 3], [1, 2]]


def test_only_responses_count(tmp_path):
    tokenizer = tiny.tokenizer()
    file = written(
        tmp_path / "data.jsonl",
        {"prompt": "2+2=", "completion": "4"},
        "",
        {"instruction": "Say", "input": "hey", "output": "ho"},
        {"text": "abc"},
    )
    rows = read_rows(file, tokenizer, 24, packed=False)
    assert rows.places is None
    assert [learned_text(rows, tokenizer, row) for row in range(3)] == ["4</s>", "ho</s>", "bc</s>"]
    assert tokenizer.decode(rows.tokens[1]).startswith("Say\n\nhey\n\nho</s>")


def test_conversations_follow_the_template(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    file = written(
        tmp_path / "data.jsonl",
        {"messages": [{"role": role, "content": content} for role, content in turns]},
        {"instruction": "e", "output": "f"},
    )
    rows = read_rows(file, tokenizer, 64, packed=False)
    assert [learned_text(rows, tokenizer, row) for row in range(2)] == ["b|d|", "f|"]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3", "bloom", "mamba", "zamba2"])
def test_the_loss_of_a_document_does_not_depend_on_its_mates(name, tmp_path):
    network, tokenizer = tiny.model(name), tiny.tokenizer()
    apart = keeps_apart(network, tiny.VOCAB)
    assert apart == (name in ("llama", "gemma3_text", "qwen3"))
    examples = [{"prompt": "ab" * (count + 1), "completion": "cd" * (5 - count)} for count in range(5)]
    together = read_rows(written(tmp_path / "all.jsonl", *examples), tokenizer, 32, packed=apart)
    assert len(together) == (3 if apart else 5)
    alone = [read_rows(written(tmp_path / "one.jsonl", each), tokenizer, 32, packed=apart) for each in examples]
    with torch.no_grad():
        whole = float(NextTokens(Course(network, None, together, together)).loss(range(len(together))))
        parts = [float(NextTokens(Course(network, None, each, each)).loss([0])) for each in alone]
    assert whole == pytest.approx(sum(parts), rel=1e-5)
    assert int(together.learned.sum()) == sum(int(each.learned.sum()) for each in alone)


@pytest.mark.parametrize("name", ["llama", "mamba2", "gpt2"])
def test_recomputing_gives_the_same_gradients_and_ends(name):
    network, rows = tiny.model(name), Rows.whole(tiny.ids(2, 24))
    found = []
    for wanted in (False, True):
        network.zero_grad()
        blocks, calls = BlockModel.from_module(network).blocks, []
        handle = next(blocks[1].children()).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with recomputed(blocks, wanted=wanted):
            NextTokens(Course(network, None, rows, rows)).loss(range(2)).backward()
        handle.remove()
        found.append({path: p.grad.clone() for path, p in network.named_parameters() if p.grad is not None})
        assert len(calls) == 1 + wanted
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][path], found[1][path], atol=1e-6) for path in found[0])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"text": "ab"}', "{"], "Line 2 of data.jsonl"),
        (['{"text": "ab"}', "", "[1]"], "Line 3 of data.jsonl"),
        (['{"prompt": "ab"}'], "no `completion`"),
        (['{"text": 3}'], "`text` is no text"),
        (['{"question": "ab"}'], "the fields question"),
        (['{"messages": [{"role": "user", "content": "a"}]}'], "turn of the assistant"),
        (['{"messages": [{"role": "assistant", "content": "a"}]}'], "no chat template"),
        ([], "nothing to learn"),
        (['{"prompt": "' + "a" * 50 + '", "completion": "b"}'], "nothing to learn"),
    ],
)
def test_mistakes_are_named_by_their_line(lines, words, tmp_path):
    with pytest.raises(Problem) as caught:
        read_rows(written(tmp_path / "data.jsonl", *lines), tiny.tokenizer(), 32, packed=True)
    assert words in f"{caught.value} {caught.value.why}"
    with pytest.raises(Problem, match="no file"):
        read_rows(str(tmp_path / "none.jsonl"), tiny.tokenizer(), 32, packed=True)


def test_other_ends_of_lines_stand_inside_a_text(tmp_path):
    file = written(tmp_path / "data.jsonl", json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False), {"text": "four"})
    assert len(read_rows(file, tiny.tokenizer(), 32, packed=True).tokens) >= 1
    (tmp_path / "odd.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(Problem, match="cannot be understood"):
        read_rows(str(tmp_path / "odd.jsonl"), tiny.tokenizer(), 32, packed=True)


def test_dropout_does_not_hide_that_documents_are_kept_apart():
    model = tiny.model("gpt2").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    assert keeps_apart(model, tiny.VOCAB)
    assert model.training
