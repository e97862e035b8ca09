"""Curation and tokenizer: every filter drops what it is meant to and nothing else, whatever the order and the shards; damaged and empty input is named."""

import json
import random

import pytest
import torch

from duramen.problem import Problem
from duramen.recipe import parse_settings
from duramen.train import curate, tokenizer
from duramen.train.exercises import WORDS
from duramen.train.stage import Stage


def document(seed, sentences=12):
    """English enough, and no thirteen words of it are in another."""
    draw = random.Random(seed)
    words = [
        f"the {draw.choice(WORDS)} and the {draw.choice(WORDS)} have to be with that {draw.choice(WORDS)} of the {draw.choice(WORDS)}"
        for _ in range(sentences)
    ]
    return ". ".join(each.capitalize() for each in words) + "."


def near(text):
    """The same with another end."""
    return text[: text.rindex(" ")] + " lake."


FRENCH = (
    "Le vieux paysan est allé au marché avec sa femme et ses enfants, et ils ont acheté du pain, du fromage et des pommes pour toute la semaine. "
    * 3
)
SYMBOLS = "This is what the people of the town have to say about it: # # # # # and that is all. " * 5


@pytest.fixture
def sources(tmp_path):
    evaluation = document(99)
    quoted = " ".join(evaluation.split()[10:40])
    texts = [
        *map(document, range(40)),
        document(0),
        near(document(1)),
        FRENCH,
        SYMBOLS,
        "This is too short to be of any use to the people.",
        f"{document(50)} {quoted} {document(51)}",
    ]
    (tmp_path / "corpus").mkdir()
    for part in range(2):
        rows = [json.dumps({"text": text}) for text in texts[part::2]]
        (tmp_path / "corpus" / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "exam.txt").write_text(evaluation)
    return tmp_path


def carried_out(folder, corpus, **more):
    source = {"text": str(corpus), "licence": "CC0-1.0"}
    settings = {"sources": [source], "decontaminate": [str(corpus.parent / "exam.txt")], "shards": 2, "held_out": 0.1} | more
    return curate.apply(Stage(folder, {}, 0), parse_settings(curate.Settings, settings, "curate"))


def test_each_filter_takes_what_it_should(sources, tmp_path):
    found = carried_out(tmp_path / "one", sources / "corpus")
    lost = {each["filter"]: each["in"] - each["out"] for each in found["filters"]}
    assert lost == {"read": 0, "language": 1, "quality": 2, "decontamination": 1, "exact duplicates": 1, "near duplicates": 1}
    assert found["documents"]["train"] + found["documents"]["held_out"] == 40
    assert found["documents"]["held_out"] >= 1
    assert found["filters"][3]["reasons"] == {str(sources / "exam.txt"): 1}
    assert "paysan" in found["samples"]["language"][0]
    kept = [row["text"] for split in curate.SPLITS for row in curate.read_split(tmp_path / "one" / "data", split)]
    assert {document(0), *map(document, range(2, 40))} <= set(kept)
    assert (document(1) in kept) + (near(document(1)) in kept) == 1


def test_order_and_shards_decide_nothing_but_where_documents_lie(sources, tmp_path):
    one = carried_out(tmp_path / "one", sources / "corpus")
    for file in (sources / "corpus").iterdir():
        file.write_text("\n".join(reversed(file.read_text().splitlines())) + "\n")
    other = carried_out(tmp_path / "other", sources / "corpus", shards=1)
    assert sum(other["documents"].values()) == sum(one["documents"].values())

    def texts(name, split):
        rows = curate.read_split(tmp_path / name / "data", split)
        return {row["text"] for row in rows} - {document(1), near(document(1))}  # either of them may be kept

    assert all(texts("one", split) == texts("other", split) for split in curate.SPLITS)


def test_a_damaged_file_is_named_and_finished_shards_are_kept(sources, tmp_path):
    broken = sources / "corpus" / "1.jsonl"
    whole = broken.read_text()
    broken.write_text(whole[: len(whole) // 2])
    with pytest.raises(Problem, match=r"1\.jsonl"):
        carried_out(tmp_path / "one", sources / "corpus")
    assert len(list((tmp_path / "one" / "work" / "marks" / "filter" / "completions").iterdir())) == 1
    broken.write_text(whole)
    assert carried_out(tmp_path / "one", sources / "corpus")["documents"]["train"] > 0


def test_nothing_left_is_said_with_what_took_it(sources, tmp_path):
    with pytest.raises(Problem, match="left nothing of 46 documents") as caught:
        carried_out(tmp_path / "one", sources / "corpus", words=[5000, 6000])
    assert "quality dropped" in caught.value.why


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": [{"text": "nowhere.txt"}]}, "no embedded text"),
        ({"sources": [{"text": "exam.txt"}]}, "has no licence"),
        ({"sources": [{"text": "exam.txt", "licence": "MIT"}] * 2}, "Two sources"),
    ],
)
def test_sources_that_cannot_be(sources, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(sources)
    with pytest.raises(Problem, match=words):
        carried_out(tmp_path / "one", sources / "corpus", **change)


@pytest.fixture
def tokenized(sources, tmp_path):
    carried_out(tmp_path / "curated", sources / "corpus")
    stage = Stage(tmp_path / "tokenized", {"data": tmp_path / "curated" / "data"}, 0)
    stage.folder.mkdir()
    return stage, tokenizer.apply(stage, tokenizer.Settings(vocabulary=400))


def test_tokens_are_the_documents(tokenized, tmp_path):
    from transformers import AutoTokenizer

    stage, found = tokenized
    spoken = AutoTokenizer.from_pretrained(stage.folder / "tokenizer")
    assert found["vocabulary"] == len(spoken) == 400
    assert 1 < found["bytes_per_token"] < 8
    for text in ("naïve Ω 漢字 \t 3.14\n\n", "<|user|> is one token"):
        assert spoken.decode(spoken(text)["input_ids"]) == text
    assert len(spoken("12345")["input_ids"]) == 5, "digits stand alone"
    for split in curate.SPLITS:
        written = []
        for file in sorted((stage.folder / "tokens").glob(f"{split}-*")):
            shard = tokenizer.read_shard(file)
            starts = [0, *shard.ends[:-1]]
            written += [
                spoken.decode(torch.tensor(shard.tokens[start:end].astype("int64")))
                for start, end in zip(starts, shard.ends, strict=True)
            ]
        assert written == [row["text"] + tokenizer.END for row in curate.read_split(tmp_path / "curated" / "data", split)]


def test_turns_are_written_so_that_answers_can_be_told(tokenized):
    from transformers import AutoTokenizer

    spoken = AutoTokenizer.from_pretrained(tokenized[0].folder / "tokenizer")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]
    whole = spoken.apply_chat_template(turns, tokenize=False)
    assert whole == "<|user|>\nWho?\n<|assistant|>\nHe.<|endoftext|>\n"
    assert whole.startswith(spoken.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))


def test_too_little_text_for_the_vocabulary(sources, tmp_path):
    carried_out(tmp_path / "curated", sources / "corpus")
    with pytest.raises(Problem, match="20,000 were asked for"):
        tokenizer.apply(Stage(tmp_path, {"data": tmp_path / "curated" / "data"}, 0), tokenizer.Settings(vocabulary=20_000))


def test_a_damaged_shard_of_tokens_is_named(tokenized):
    file = next((tokenized[0].folder / "tokens").glob("train-*"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(Problem, match="cannot be read"):
        tokenizer.read_shard(file)
