"""Text to token windows: for calibration seeded and shuffled, for evaluation in order and disjoint."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duramen.assets import read_text
from duramen.problem import Problem
from duramen.reading import read_lines, reading


def read_documents(source: str) -> list[str]:
    """Reads a text: an embedded name, or a file (.txt, .jsonl or .parquet with a column ``text``).

    Raises:
        Problem: If there is no such text, or it has no ``text`` column.
    """
    path = Path(source)
    if not path.is_file():
        return read_text(source)
    with reading(path):
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for _, line in read_lines(path)]
            return [_text_of(row, path) for row in rows]
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return [_text_of(row, path) for row in pyarrow.parquet.read_table(path).to_pylist()]
        return [path.read_text(encoding="utf-8")]


def _text_of(row: dict[str, Any], path: Path) -> str:
    if "text" not in row:
        raise Problem(
            f"{path.name} has no field `text`; it has {', '.join(row)}.",
            why="each row's document is read from that field.",
            fix="rename the field.",
        )
    return str(row["text"])


def calibration_tokens(tokenizer: Any, sources: Sequence[str], *, sequences: int, length: int, seed: int) -> Tensor:
    """Packs shuffled documents into windows of equal length, without padding.

    Args:
        tokenizer: A transformers tokenizer.
        sources: Embedded names or files; their documents are shuffled together.
        sequences: S, number of windows.
        length: T, tokens per window.
        seed: Of the shuffle.

    Returns:
        Token ids, [S, T].

    Raises:
        Problem: If the text is shorter than that.
    """
    documents = [document for source in sources for document in read_documents(source)]
    random.Random(seed).shuffle(documents)  # noqa: S311
    begin, ids = opening(tokenizer), []
    body = length - len(begin)
    for start in range(0, len(documents), 64):
        for encoded in tokenizer(documents[start : start + 64], add_special_tokens=False)["input_ids"]:
            ids += encoded + _separator(tokenizer)
        if len(ids) >= sequences * body:
            break
    if len(ids) < sequences * body:
        raise _too_short(sources, len(ids), sequences, length)
    return _windows(ids, sequences, begin, body)


def evaluation_tokens(tokenizer: Any, source: str, *, length: int, windows: int | None) -> Tensor:
    """Cuts a text, in order, into disjoint windows.

    Args:
        tokenizer: A transformers tokenizer; see ``opening``.
        source: Embedded name or file; documents are joined by blank lines.
        length: T, tokens per window.
        windows: S, how many windows from the start; None for all.

    Returns:
        Token ids, [S, T].

    Raises:
        Problem: If the text is shorter than one window.
    """
    text = "\n\n".join(read_documents(source))
    if windows is not None:
        text = text[: windows * length * 16]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = opening(tokenizer)
    body = length - len(begin)
    count = len(ids) // body if windows is None else windows
    if count == 0 or len(ids) < count * body:
        raise _too_short([source], len(ids), max(count, 1), length)
    return _windows(ids, count, begin, body)


def opening(tokenizer: Any) -> list[int]:
    """What every text must begin with: BOS for the Gemma models, which are lost without it; nothing for all others.

    The literature's WikiText-2 numbers have no BOS in their windows, also where a tokenizer would add one.
    """
    return [tokenizer.bos_token_id] if type(tokenizer).__name__.startswith("Gemma") else []


def _windows(ids: list[int], count: int, begin: list[int], body: int) -> Tensor:
    """``count`` windows of ``body`` tokens each behind the opening, [count, len(begin) + body]."""
    texts = torch.tensor(ids[: count * body]).reshape(count, body)
    return torch.cat([torch.tensor(begin, dtype=texts.dtype).expand(count, -1), texts], dim=1)


def _separator(tokenizer: Any) -> list[int]:
    return list(tokenizer("\n\n", add_special_tokens=False)["input_ids"])


def _too_short(sources: Sequence[str], found: int, sequences: int, length: int) -> Problem:
    return Problem(
        f"{', '.join(sources)}: {found:,} tokens, but {sequences} windows of {length} need {sequences * length:,}.",
        why="the text is too short for the number and length of the windows.",
        fix=f"fewer or shorter windows (`length: {max(found // max(sequences, 1), 1)}`), or more text.",
    )


def byte_tokenizer() -> Any:
    """A transformers tokenizer with one token per byte and three special ones, for models that are trained from scratch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"<pad>": 256, "<s>": 257, "</s>": 258}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
