"""What is learned: rows of documents, each apart from its neighbours, with the tokens that count.

Examples come from jsonl in the forms that are in use: ``text``; ``prompt`` and ``completion``; ``instruction``, perhaps ``input``, and ``output``;
``messages`` with ``role`` and ``content``. Only responses count where there are any. Documents are packed into rows, the longest first, each into
the fullest row that still has room (best-fit decreasing); positions begin anew in every document, by which transformers keeps
attention inside it. Models that cannot be told so get a row for every document.
"""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from duramen.problem import Problem
from duramen.reading import read_lines

FORMS = "`text`; `prompt` and `completion`; `instruction`, `output` and perhaps `input`; or `messages`"
Parts = list[tuple[str, bool]]
"""The parts of a document in order, and whether each is to be learned."""


@dataclass(frozen=True)
class Rows:
    """Rows of tokens.

    Attributes:
        tokens: Token ids, [S, T].
        learned: Which of them are targets, bool [S, T]; the first of a document never is.
        places: The place of each in its document, [S, T]; None where every row is one document.
    """

    tokens: Int[Tensor, "S T"]
    learned: Bool[Tensor, "S T"]
    places: Int[Tensor, "S T"] | None = None

    @classmethod
    def whole(cls, tokens: Int[Tensor, "S T"]) -> Rows:
        """Rows of plain text, all of which is learned."""
        learned = torch.ones_like(tokens, dtype=torch.bool)
        learned[:, 0] = False
        return cls(tokens, learned)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> Rows:
        """Some of the rows."""
        return Rows(self.tokens[rows], self.learned[rows], None if self.places is None else self.places[rows])

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        places = None if self.places is None else self.places.to(device)
        return Rows(self.tokens.to(device), self.learned.to(device), places)


def read_rows(file: str, tokenizer: Any, length: int, *, packed: bool) -> Rows:
    """The examples of a jsonl file as rows of so many tokens.

    Args:
        file: The file.
        tokenizer: A transformers tokenizer; ``messages`` and ``instruction`` use its chat template, if it has one.
        length: T; what is longer is cut at its end.
        packed: Whether several documents may share a row.

    Raises:
        Problem: If there is no such file, a line is no example, or nothing is left to learn.
    """
    documents = [tokenise(parts, tokenizer, length) for parts in examples(file, tokenizer)]
    documents = [document for document in documents if any(learned for _, learned in document[1:])]
    if not documents:
        raise Problem(
            f"{file} has nothing to learn.",
            why=f"no response begins within {length} tokens.",
            fix="longer rows, or other data.",
        )
    rows = pack([len(document) for document in documents], length) if packed else [[number] for number in range(len(documents))]
    filler = getattr(tokenizer, "pad_token_id", None) or getattr(tokenizer, "eos_token_id", None) or 0
    tokens = torch.full((len(rows), length), filler)
    learned, places = torch.zeros(len(rows), length, dtype=torch.bool), torch.arange(length).repeat(len(rows), 1)
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            end = start + len(documents[number])
            tokens[row, start:end] = torch.tensor([token for token, _ in documents[number]])
            learned[row, start:end] = torch.tensor([False, *(wanted for _, wanted in documents[number][1:])])
            places[row, start:] -= int(places[row, start])
            start = end
        places[row, start:] -= int(places[row, start]) if start < length else 0
    return Rows(tokens, learned, places if packed else None)


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which documents share a row: the longest first, each into the fullest row that still has room for it."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        at = bisect_left(free, (lengths[number], -1))
        left, row = free.pop(at) if at < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        insort(free, (left - lengths[number], row))
    return rows


def tokenise(parts: Parts, tokenizer: Any, length: int) -> list[tuple[int, bool]]:
    """The first tokens of a document, and whether each is learned; a part that is learned keeps its tokens to itself."""
    found: list[tuple[int, bool]] = []
    for text, learned in parts:
        found += [(token, learned) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return found[:length]


def examples(name: str, tokenizer: Any) -> Iterator[Parts]:
    """The documents of a jsonl file, in parts.

    Raises:
        Problem: If there is no such file, or a line is no example.
    """
    file = Path(name)
    if not file.is_file():
        raise Problem(f"There is no file {file}.", why="`data` names the examples to learn.", fix=f"a jsonl file with {FORMS}.")
    for number, line in read_lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _no_example(file, number, f"it is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise _no_example(file, number, "it is no JSON object")
        yield _parts(row, tokenizer, file, number)


def _parts(row: dict[str, Any], tokenizer: Any, file: Path, number: int) -> Parts:
    """One example in parts."""
    end = getattr(tokenizer, "eos_token", None) or ""

    def field(name: str) -> str:
        if not isinstance(row.get(name), str):
            raise _no_example(file, number, f"it has no `{name}`" if name not in row else f"its `{name}` is no text")
        return str(row[name])

    if "messages" in row:
        return _turns(row["messages"], tokenizer, file, number)
    if "instruction" in row:
        asked = "\n\n".join(filter(None, (field("instruction"), field("input") if row.get("input") else "")))
        answer = field("output")
        if getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            return _turns(turns, tokenizer, file, number)
        return [(f"{asked}\n\n", False), (answer + end, True)]
    if "prompt" in row:
        return [(field("prompt"), False), (field("completion") + end, True)]
    if "text" in row:
        return [(field("text") + end, True)]
    raise _no_example(file, number, f"it has the fields {', '.join(row) or 'none'}")


def _turns(messages: Any, tokenizer: Any, file: Path, number: int) -> Parts:
    """A conversation in parts: what the assistant says is learned, with what ends its turn."""
    fine = isinstance(messages, list) and all(
        isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("role", "content")) for each in messages
    )
    if not fine or not any(each["role"] == "assistant" for each in messages):
        raise _no_example(file, number, "its `messages` are no list of `role` and `content` with a turn of the assistant")
    if not getattr(tokenizer, "chat_template", None):
        raise Problem(
            f"Line {number} of {file.name} is a conversation, and the tokenizer has no chat template.",
            why="only a template says how turns are written.",
            fix="`prompt` and `completion`, or a model with a template.",
        )

    def written(count: int, *, asks: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asks))

    parts, before = [], ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = written(place, asks=True), written(place + 1, asks=False)
        if not (asked.startswith(before) and answered.startswith(asked)):
            raise _no_example(file, number, "its turns are not written one after another by the chat template")
        parts += [(asked[len(before) :], False), (answered[len(asked) :], True)]
        before = answered
    return parts


def _no_example(file: Path, number: int, why: str) -> Problem:
    return Problem(f"Line {number} of {file.name} is no example.", why=f"{why}.", fix=f"one JSON object a line, with {FORMS}.")


@torch.no_grad()
def keeps_apart(network: nn.Module, vocabulary: int) -> bool:
    """Whether a model can be told where documents begin: it is asked, with two documents in a row, and the second alone."""
    if "position_ids" not in signature(network.forward).parameters:
        return False
    learning = network.training
    network.eval()
    device = next(network.parameters()).device
    tokens = (torch.arange(1, 17, device=device)[None] * 7919) % vocabulary
    places = torch.arange(8, device=device).repeat(2)[None]
    together = network(input_ids=tokens, position_ids=places, use_cache=False).logits[:, 8:].float()
    alone = network(input_ids=tokens[:, 8:], position_ids=places[:, 8:], use_cache=False).logits
    network.train(learning)
    most = 1e-5 if alone.dtype == torch.float32 else 2**-6
    return bool((together - alone.float()).abs().max() <= most * alone.float().abs().max())
