"""Text to token windows."""

import json
import random

import pytest
import torch

import tiny
from duramen.calibrate.tokens import calibration_tokens, evaluation_tokens, read_documents
from duramen.problem import Problem

DOCUMENTS = [f"document {number} " + "word " * number for number in range(40)]


def write(folder, kind):
    file = folder / f"text.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), file)
    return str(file)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_of_documents(tmp_path, kind):
    assert read_documents(write(tmp_path, kind)) == DOCUMENTS


def test_calibration_is_seeded_and_packs_without_padding(tmp_path):
    source, tokenizer = write(tmp_path, "jsonl"), tiny.tokenizer()
    first = calibration_tokens(tokenizer, [source], sequences=6, length=50, seed=1)
    assert first.shape == (6, 50)
    assert torch.equal(first, calibration_tokens(tokenizer, [source], sequences=6, length=50, seed=1))
    assert not torch.equal(first, calibration_tokens(tokenizer, [source], sequences=6, length=50, seed=2))
    shuffled = list(DOCUMENTS)
    random.Random(1).shuffle(shuffled)
    assert tokenizer.decode(first.flatten()) == ("\n\n".join(shuffled) + "\n\n")[:300]


def test_evaluation_is_in_order_and_disjoint(texts):
    tokenizer, text = tiny.tokenizer(), texts[1].read_text()
    windows = evaluation_tokens(tokenizer, str(texts[1]), length=30, windows=None)
    assert windows.shape == (len(text) // 30, 30)
    assert tokenizer.decode(windows.flatten()) == text[: windows.numel()]
    assert torch.equal(evaluation_tokens(tokenizer, str(texts[1]), length=30, windows=4), windows[:4])


def test_too_little_text_says_how_much_there_is(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("only this")
    for call in (
        lambda: calibration_tokens(tiny.tokenizer(), [str(file)], sequences=1, length=64, seed=0),
        lambda: evaluation_tokens(tiny.tokenizer(), str(file), length=64, windows=None),
    ):
        with pytest.raises(Problem, match="tokens, but 1 windows of 64 need 64"):
            call()


def test_a_table_without_text(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"body": "x"}\n')
    with pytest.raises(Problem, match="no field `text`; it has body"):
        read_documents(str(file))


def test_an_unknown_text_lists_the_embedded_ones():
    with pytest.raises(Problem, match="no embedded text `squda`") as caught:
        read_documents("squda")
    assert "squad" in caught.value.why


class GemmaLike:
    """A tokenizer of the class that marks models which are lost without a BOS."""

    bos_token_id = 257

    def __call__(self, text, **options):
        return tiny.tokenizer()(text, **options)


GemmaLike.__name__ = "GemmaTokenizer"


def test_gemma_windows_begin_with_bos(texts):
    source = str(texts[0])
    for found in (
        calibration_tokens(GemmaLike(), [source], sequences=3, length=20, seed=0),
        evaluation_tokens(GemmaLike(), source, length=20, windows=3),
    ):
        assert found.shape == (3, 20)
        assert (found[:, 0] == 257).all()
    plain = evaluation_tokens(tiny.tokenizer(), source, length=19, windows=3)
    assert torch.equal(evaluation_tokens(GemmaLike(), source, length=20, windows=3)[:, 1:], plain)
