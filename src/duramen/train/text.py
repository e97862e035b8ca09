"""What pretraining sees: documents packed into rows of one length, drawn from their sources in given shares, each row found from its number alone.

A document that is longer than a row is cut into pieces. Pieces of one source are packed best-fit, the longest first. A plan of N rows is a permutation of
[0, N): the first share of the numbers are rows of the first source, and so on, and within a source every epoch has an order of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from duramen.problem import Problem
from duramen.train.data import Rows, pack
from duramen.train.order import sample_index
from duramen.train.tokenizer import Shard, read_shard

EPOCHS = 4
"""How often a source may be seen; more hardly teach anything (arXiv 2305.16264)."""


@dataclass(frozen=True)
class Packed:
    """The rows of one source.

    Attributes:
        pieces: (shard, first token, end, whether its document begins there) of every piece, [P, 4].
        rows: Of every row the pieces in it.
        length: T, tokens of a row.
    """

    pieces: np.ndarray
    rows: list[list[int]]
    length: int

    @property
    def tokens(self) -> int:
        """In all rows."""
        return int((self.pieces[:, 2] - self.pieces[:, 1]).sum())

    @property
    def utilisation(self) -> float:
        """Share of the places in rows that hold a token."""
        return self.tokens / max(1, len(self.rows) * self.length)

    @property
    def cut(self) -> float:
        """Share of the tokens that stand in another piece than the first of their document."""
        later = self.pieces[self.pieces[:, 3] == 0]
        return float((later[:, 2] - later[:, 1]).sum() / max(1, self.tokens))


@dataclass(frozen=True)
class Corpus:
    """The tokens of one split, in rows.

    Attributes:
        shards: Of tokens.
        packed: By source.
        length: T, tokens of a row.
        filler: Token of the places that stay empty.
        shared: Whether a row may hold several pieces.
    """

    shards: list[Shard]
    packed: dict[str, Packed]
    length: int
    filler: int

    def row(self, source: str, number: int) -> list[np.ndarray]:
        """The pieces of a row."""
        found = self.packed[source]
        spans = [found.pieces[piece] for piece in found.rows[number]]
        return [self.shards[shard].tokens[start:end] for shard, start, end, _ in spans]

    def rows(self, wanted: Sequence[tuple[str, int]]) -> Rows:
        """Rows by source and number."""
        tokens = torch.full((len(wanted), self.length), self.filler)
        learned = torch.zeros(len(wanted), self.length, dtype=torch.bool)
        places = torch.zeros(len(wanted), self.length, dtype=torch.long)
        for row, (source, number) in enumerate(wanted):
            start = 0
            for piece in self.row(source, number):
                end = start + len(piece)
                tokens[row, start:end] = torch.from_numpy(piece.astype(np.int64))
                learned[row, start + 1 : end] = True
                places[row, start:end] = torch.arange(len(piece))
                start = end
            places[row, start:] = torch.arange(self.length - start) + (places[row, start - 1] + 1 if start else 0)
        return Rows(tokens, learned, places)

    def targets(self, source: str, number: int) -> int:
        """Target tokens of a row: all but the first of every piece."""
        found = self.packed[source]
        return int(sum(found.pieces[piece, 2] - found.pieces[piece, 1] - 1 for piece in found.rows[number]))


def read_corpus(folder: Path, split: str, length: int, filler: int, *, shared: bool) -> Corpus:
    """Packs the tokens of a split.

    Args:
        folder: Of tokens.
        split: ``train`` or ``held_out``.
        length: T, tokens of a row.
        filler: Token of the places that stay empty.
        shared: Whether a row may hold several pieces.

    Raises:
        Problem: If there are none.
    """
    shards = [read_shard(file) for file in sorted(folder.glob(f"{split}-*.safetensors"))]
    pieces: dict[str, list[tuple[int, int, int, bool]]] = {}
    for number, shard in enumerate(shards):
        starts = np.concatenate([[0], shard.ends[:-1]])
        for start, end, source in zip(starts.tolist(), shard.ends.tolist(), shard.sources.tolist(), strict=True):
            mine = pieces.setdefault(shard.names[source], [])
            for cut in range(start, end, length):
                if min(cut + length, end) - cut > 1:  # a single token has no target
                    mine.append((number, cut, min(cut + length, end), cut == start))
    if not pieces:
        raise Problem(
            f"{folder} has no tokens of `{split}`.",
            why="no document of it was curated.",
            fix="more text, or a larger `held_out`.",
        )
    packed = {}
    for name, mine in sorted(pieces.items()):
        lengths = [end - start for _, start, end, _ in mine]
        rows = pack(lengths, length) if shared else [[piece] for piece in range(len(mine))]
        packed[name] = Packed(np.array(mine, dtype=np.int64), rows, length)
    return Corpus(shards, packed, length, filler)


@dataclass(frozen=True)
class Plan:
    """Which rows a training of N rows sees.

    Attributes:
        corpus: Has them.
        counts: Of N how many are of every source.
        seed: Of all orders.
    """

    corpus: Corpus
    counts: dict[str, int]
    seed: int

    @property
    def rows(self) -> int:
        """N."""
        return sum(self.counts.values())

    def place(self, number: int) -> tuple[str, int]:
        """The source and row of a number below N."""
        for which, (source, count) in enumerate(self.counts.items()):
            if number < count:
                there = len(self.corpus.packed[source].rows)
                epoch, inside = divmod(number, there)
                return source, sample_index(self.seed * 1_009 + which, epoch, inside, there)
            number -= count
        raise IndexError(number)

    def targets(self) -> dict[str, int]:
        """Target tokens of every source in all N rows: so many whole epochs, and the first rows of another."""
        found = {}
        for which, (source, count) in enumerate(self.counts.items()):
            rows = len(self.corpus.packed[source].rows)
            each = [self.corpus.targets(source, row) for row in range(rows)]
            whole, rest = divmod(count, rows)
            seed = self.seed * 1_009 + which
            found[source] = whole * sum(each) + sum(each[sample_index(seed, whole, place, rows)] for place in range(rest))
        return found

    def epochs(self) -> dict[str, float]:
        """How often every source is seen."""
        return {source: count / len(self.corpus.packed[source].rows) for source, count in self.counts.items()}


def make_plan(corpus: Corpus, rows: int, weights: Mapping[str, float], seed: int, *, epochs: float = EPOCHS) -> Plan:
    """Shares N rows out to the sources.

    Args:
        corpus: Has them.
        rows: N.
        weights: Share of the rows by source; empty for what there is of each.
        seed: Of all orders.
        epochs: How often a source may be seen.

    Raises:
        Problem: If the weights do not fit the sources or do not sum to 1, or a source is too small for its share.
    """
    there = {name: len(each.rows) for name, each in corpus.packed.items()}
    if weights and (set(weights) != set(there) or abs(sum(weights.values()) - 1) > 1e-6):
        raise Problem(
            f"The weights {dict(weights)} are no mixture of {', '.join(there)}.",
            why="every source needs a share, and they sum to 1.",
            fix=f"for instance `weights: {{{', '.join(f'{name}: {count / sum(there.values()):.3f}' for name, count in there.items())}}}`.",
        )
    shares = weights or {name: count / sum(there.values()) for name, count in there.items()}
    ends = np.round(np.cumsum([shares[name] for name in there]) * rows).astype(int)
    counts = {name: int(count) for name, count in zip(there, np.diff(ends, prepend=0), strict=True)}
    plan = Plan(corpus, counts, seed)
    for name, times in plan.epochs().items():
        if times > epochs:
            raise Problem(
                f"`{name}` would be seen {times:.1f} times.", why=f"it has {there[name]:,} rows and is to give {counts[name]:,}.",
                fix=f"fewer steps, another mixture, more text, or `epochs: {times:.1f}`.",
            )  # fmt: skip
    return plan
