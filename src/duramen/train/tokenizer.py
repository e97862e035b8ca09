"""The tokenizer: byte-level BPE (arXiv 1508.07909) learned from the documents, and the documents as its tokens.

Any text can be written in it, since its alphabet are the bytes. Special tokens are fixed before it is learned. How much text a token holds is
reported on documents that it was not learned from: bytes per token, and tokens per word (its fertility).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from duramen.problem import Exit, Problem
from duramen.registry import Place, method
from duramen.registry import Settings as Base
from duramen.rundir import write_json, write_tensors
from duramen.train.curate import SPLITS, read_documents_of, read_split
from duramen.train.stage import DATA, TOKENIZER, TOKENS, Stage

END, PAD = "<|endoftext|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Turns as Moxin writes them: the role, the text, and the end of what the assistant says."""
AT_ONCE = 256


class Settings(Base):
    """Settings of the tokenizer."""

    vocabulary: Annotated[int, Field(ge=300)] = 4096
    """Tokens, special ones counted."""
    tokenizer: Place = ""
    """Folder of a model whose tokenizer is taken as it is; empty to learn one."""


@method("tokenize", title="Byte-level BPE", paper="arXiv 1508.07909", kind="train", settings=Settings)
def apply(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Writes ``tokenizer`` and, of every file of documents, its ``tokens``.

    Args:
        stage: Has the documents.
        settings: See ``Settings``.

    Returns:
        Vocabulary, tokens by split and source, bytes per token and tokens per word on what is set apart.

    Raises:
        Problem: If there are no documents, or too few for the vocabulary.
    """
    data = stage.need(DATA, "tokenize")
    tokenizer = opened(stage, settings, data)
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    (stage.folder / TOKENS).mkdir(exist_ok=True)
    for split in SPLITS:
        for file in sorted((data / split).glob("*.jsonl")):
            stage.said(f"tokens of {split}/{file.name}")
            written = stage.folder / TOKENS / f"{split}-{file.stem}.safetensors"
            if not written.is_file():
                write_tokens(written, file, tokenizer)
            for name, count in read_shard(written).counts().items():
                counts[split][name] = counts[split].get(name, 0) + count
    record = {"vocabulary": len(tokenizer), "tokens": counts} | fertility(tokenizer, data)
    write_json(stage.folder / "tokenizer.json", record)
    return record


def opened(stage: Stage, settings: Settings, data: Path) -> Any:
    """The tokenizer of the stage, learned if it is not there yet."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = stage.folder / TOKENIZER
    if not (folder / "tokenizer.json").is_file():
        if settings.tokenizer:
            tokenizer: Any = AutoTokenizer.from_pretrained(settings.tokenizer)
        else:
            stage.said("learning the tokenizer")
            inner = learn((row["text"] for row in read_split(data, "train")), settings.vocabulary)
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=inner,
                eos_token=END,
                bos_token=END,
                unk_token=END,
                pad_token=PAD,
                additional_special_tokens=list(ROLES),
            )
            tokenizer.chat_template = TEMPLATE
        partial = folder.with_name(f"{folder.name}.partial")
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def learn(texts: Iterator[str], vocabulary: int) -> Any:
    """A byte-level BPE of so many tokens.

    Args:
        texts: To learn from.
        vocabulary: Its size, special tokens counted.

    Raises:
        Problem: If the texts have too few different words for it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END, PAD, *ROLES], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    if inner.get_vocab_size() < vocabulary:
        raise Problem(
            f"The documents give {inner.get_vocab_size():,} tokens, and {vocabulary:,} were asked for.", why="there is too little text.",
            fix=f"`vocabulary: {inner.get_vocab_size()}`, or more text.", code=Exit.CHECK_FAILED,
        )  # fmt: skip
    return inner


def write_tokens(written: Path, file: Path, tokenizer: Any) -> None:
    """Writes the documents of a file as tokens, each with its end.

    The result holds ``tokens``, one document after another; ``ends`` of them in it; ``sources``, the number of each one's source; and the names of the
    sources in its header.

    Args:
        written: A safetensors file.
        file: Documents as jsonl.
        tokenizer: A transformers tokenizer.
    """
    documents = list(read_documents_of(file))
    names = sorted({row["metadata"]["source"] for row in documents})
    tokens: list[np.ndarray] = []
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    for start in range(0, len(documents), AT_ONCE):
        texts = [row["text"] for row in documents[start : start + AT_ONCE]]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokens += [np.array([*ids, tokenizer.eos_token_id], dtype=kind) for ids in found]
    ends = np.cumsum([len(each) for each in tokens], dtype=np.int64)
    sources = np.array([names.index(row["metadata"]["source"]) for row in documents], dtype=np.int64)
    whole = np.concatenate(tokens) if tokens else np.zeros(0, kind)
    arrays = {"tokens": whole, "ends": ends, "sources": sources}
    write_tensors(written, {name: torch.from_numpy(each) for name, each in arrays.items()}, ("sources", json.dumps(names)))


@dataclass(frozen=True)
class Shard:
    """The tokens of one file of documents; the arrays stay on the disk until they are read.

    Attributes:
        tokens: Of all documents, one after another.
        ends: Of the documents in it.
        sources: Number of each one's source.
        names: Of the sources.
    """

    tokens: np.ndarray
    ends: np.ndarray
    sources: np.ndarray
    names: list[str]

    def counts(self) -> dict[str, int]:
        """Tokens of every source."""
        lengths = np.diff(self.ends, prepend=0)
        return {name: int(lengths[self.sources == number].sum()) for number, name in enumerate(self.names)}


def read_shard(file: Path) -> Shard:
    """Opens what ``write_tokens`` wrote.

    Raises:
        Problem: If it is damaged.
    """
    try:
        with safe_open(file, "pt") as stream:
            names = json.loads(stream.metadata()["sources"])
            found = {name: stream.get_tensor(name).numpy() for name in ("tokens", "ends", "sources")}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise Problem(
            f"The tokens {file} cannot be read: {error}.", why="the file was cut off or changed after it was written.",
            fix="remove the folder of the stage that wrote it, and run the same line again.", code=Exit.CHECK_FAILED,
        ) from error  # fmt: skip
    return Shard(found["tokens"], found["ends"], found["sources"], names)


def fertility(tokenizer: Any, data: Path) -> dict[str, float]:
    """Bytes per token and tokens per word on the documents that are set apart."""
    sizes = words = tokens = 0
    for row in read_split(data, "held_out"):
        sizes += len(row["text"].encode())
        words += len(re.findall(r"\w+", row["text"]))
        tokens += len(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
    return {"bytes_per_token": sizes / max(1, tokens), "tokens_per_word": tokens / max(1, words)}
