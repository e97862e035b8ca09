"""Curation: raw text to documents that are worth learning, each once, and none of what the model will be measured on.

Runs on datatrove: its executor keeps a mark for every finished shard, its filters and its MinHash are used as they are. Documents are read, their language
told (py3langid), poor text left out (Gopher's rules, arXiv 2112.11446), documents that share 13 words in a row with an evaluation left out, and of equal
and nearly equal documents one is kept (exact, then MinHash with bands, arXiv 2107.06499). What every filter took and left is counted, and kept to be looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from duramen.assets import ASSETS, DEBIAN
from duramen.calibrate.tokens import read_documents
from duramen.problem import Exit, Problem, need
from duramen.registry import Place, method
from duramen.registry import Settings as Base
from duramen.rundir import write_json
from duramen.train.stage import DATA, WORK, Stage

NEEDED = ("datatrove", "spacy", "py3langid", "orjson", "xxhash")
SPLITS = ("train", "held_out")
SHOWN = 3
"""Dropped documents of every filter that the report shows."""


class Source(BaseModel):
    """Where documents come from."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    text: Place
    """Embedded text, file (.txt, .jsonl or .parquet with a column `text`), or folder of such files."""
    licence: str = ""
    """SPDX id; embedded texts know theirs."""

    @property
    def name(self) -> str:
        """Short, for counts and mixtures."""
        return Path(self.text).stem

    @property
    def terms(self) -> str:
        """The licence, of the source or of the embedded text."""
        asset = (ASSETS | DEBIAN).get(self.text)
        return self.licence or (asset.licence if asset else "")


class Settings(Base):
    """Settings of curation."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Where documents come from: `- text: squad`, or a file or folder with its `licence`."""
    language: str = "en"
    """Of the documents that are kept, as ISO 639-1; empty for all."""
    language_share: Annotated[float, Field(ge=0, le=1)] = 0.65
    """Least probability of that language."""
    words: Annotated[tuple[int, int], Field()] = (50, 100_000)
    """Fewest and most words of a document."""
    quality: bool = True
    """Whether Gopher's rules hold: lengths of words, symbols, bullets, ellipses, letters, stop words."""
    decontaminate: tuple[Place, ...] = ()
    """Embedded tasks and texts, or files, that the model will be measured on."""
    decontaminate_words: Annotated[int, Field(ge=2)] = 13
    """Words in a row that a document must not share with them."""
    shingle: Annotated[int, Field(ge=1)] = 5
    """Words of a shingle of MinHash."""
    bands: Annotated[int, Field(ge=1)] = 14
    """Of MinHash; 0.8 alike, documents meet in one of 14 bands of 8 with probability 0.92."""
    rows: Annotated[int, Field(ge=1)] = 8
    """Hashes of a band."""
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.02
    """Share of the documents that are not learned."""
    shards: Annotated[int, Field(ge=1)] = 4
    """Files that the work and its result are divided into."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes."""


@method("curate", title="Curation of text", paper="arXiv 2112.11446, 2107.06499", kind="train", settings=Settings)
def apply(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Writes documents to ``data/train`` and ``data/held_out``, and what was dropped to ``dropped``.

    Args:
        stage: Says where.
        settings: See ``Settings``.

    Returns:
        Counts of documents and bytes in and out, by filter and by source, and a few of those that were dropped.

    Raises:
        Problem: If a source cannot be read, or nothing is left.
    """
    need("Curation", *NEEDED, install='"duramen[train]"')
    _check_sources(settings)
    from duramen.train.pipeline import run_pipeline

    work = stage.folder / WORK
    counts = run_pipeline(settings, work, stage.said)
    found = _published(work, stage.folder, settings)
    if not found["documents"]["train"]:
        raise Problem(
            f"Curation left nothing of {counts[0]['in']:,} documents.",
            why="; ".join(f"{each['filter']} dropped {each['in'] - each['out']:,}" for each in counts if each["in"] > each["out"]) + ".",
            fix="milder settings (`words`, `quality`, `language`), or other sources; `dropped` holds what went.",
            code=Exit.CHECK_FAILED,
        )  # fmt: skip
    licences = {source.name: source.terms or "unknown" for source in settings.sources}
    record = {"filters": counts, "licences": licences} | found
    write_json(stage.folder / "curation.json", record)
    return record


def _check_sources(settings: Settings) -> None:
    """Stops at the first source that is not there, or two of one name.

    Raises:
        Problem: Then.
    """
    names = [source.name for source in settings.sources]
    if len({*names}) < len(names):
        raise Problem(
            f"Two sources are named `{next(name for name in names if names.count(name) > 1)}`.",
            why="mixtures and counts go by the name.",
            fix="rename a file.",
        )
    for source in settings.sources:
        place = Path(source.text)
        if place.exists() and not source.licence:
            raise Problem(
                f"The source {source.text} has no licence.", why="whoever releases the model must say under which terms its data came.",
                fix="`licence:` with an SPDX id, or `LicenseRef-unknown`.",
            )  # fmt: skip
        if not place.exists() and source.text not in ASSETS | DEBIAN:
            read_documents(source.text)  # says what there is


def documents(source: Source, shard: int, shards: int) -> Iterator[tuple[str, str]]:
    """The documents of one shard of a source, and their ids.

    Args:
        source: Where they come from.
        shard: From 0.
        shards: How many there are; of a folder they share the files, else the documents.

    Raises:
        Problem: If a file cannot be read; it is named.
    """
    place = Path(source.text)
    files = sorted(each for each in place.rglob("*") if each.suffix in (".txt", ".jsonl", ".parquet")) if place.is_dir() else []
    if place.is_dir() and not files:
        raise Problem(f"The folder {place} has no documents.", why="it has no .txt, .jsonl or .parquet.", fix="another folder.")
    whole = [(str(file), file.relative_to(place).as_posix()) for file in files] or [(source.text, source.name)]
    mine = whole[shard::shards] if files else whole
    for file, name in mine:
        for number, text in enumerate(_read(file)):
            if files or number % shards == shard:
                yield f"{source.name}/{name}/{number}" if files else f"{source.name}/{number}", text


def _read(file: str) -> list[str]:
    """The documents of a file or embedded text.

    Raises:
        Problem: If it is damaged.
    """
    try:
        return read_documents(file)
    except (ValueError, OSError, EOFError) as error:
        raise Problem(
            f"{file} cannot be read: {error}.", why="the file is damaged or cut off, or no UTF-8.",
            fix="mend it or take it out of the folder; shards that are finished are kept.", code=Exit.CHECK_FAILED,
        ) from error  # fmt: skip


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is set apart, by its own hash: neither order nor shards decide."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < share * 2**64


def _published(work: Path, folder: Path, settings: Settings) -> dict[str, Any]:
    """Moves what is left into the stage's folder; counts it by source."""
    target, dropped = folder / DATA, folder / "dropped"
    for place, content in ((target, work / "kept"), (dropped, work / "dropped")):
        if not place.is_dir():
            content.mkdir(parents=True, exist_ok=True)
            content.rename(place)
    counted: dict[str, dict[str, int]] = {source.name: {"documents": 0, "bytes": 0} for source in settings.sources}
    splits = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for row in read_split(target, split):
            splits[split] += 1
            counted[row["metadata"]["source"]]["documents"] += 1
            counted[row["metadata"]["source"]]["bytes"] += len(row["text"].encode())
    samples = {
        place.name: [row["text"][:300] for row, _ in zip(read_split(dropped, place.name), range(SHOWN), strict=False)]
        for place in sorted(dropped.iterdir())
    }
    return {"documents": splits, "sources": counted, "samples": samples}


def read_split(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The documents of a split: ``id``, ``text`` and ``metadata`` with their ``source``."""
    for file in sorted((folder / split).glob("*.jsonl")):
        yield from read_documents_of(file)


def read_documents_of(file: Path) -> Iterator[dict[str, Any]]:
    """The documents of one file.

    Raises:
        Problem: If it is damaged.
    """
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise Problem(
                    f"Line {number} of {file} is damaged: {error}.", why="the file was cut off or changed after it was written.",
                    fix="remove the folder of the stage that wrote it, and run the same line again.", code=Exit.CHECK_FAILED,
                ) from error  # fmt: skip
