"""The pipelines of curation on datatrove: our reader and filters among its own, run shard by shard with a mark for every finished one."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import ngrams, simplify_text

from duramen.assets import ASSETS, read_requests
from duramen.calibrate.tokens import read_documents
from duramen.train.curate import SPLITS, Settings, Source, documents, is_held_out

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

FILE = "${rank}.jsonl"


class Read(PipelineStep):  # type: ignore[misc]
    """The documents of a shard of all sources, with blank ends cut off."""

    type, name = "reader", "read"

    def __init__(self, sources: tuple[Source, ...]) -> None:
        super().__init__()
        self.sources = sources

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Gives them in the order of the sources."""
        for source in self.sources:
            for name, text in documents(source, rank, world_size):
                self.stat_update("total")
                if text.strip():
                    self.stat_update("forwarded")
                    yield Document(text=text.strip(), id=name, metadata={"source": source.name})
                else:
                    self.stat_update("dropped", "dropped_empty")


class Language(BaseFilter):  # type: ignore[misc]
    """Keeps what py3langid holds to be of one language."""

    name = "language"

    def __init__(self, language: str, share: float, dropped: JsonlWriter) -> None:
        super().__init__(dropped)
        self.language, self.share = language, share

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Judges the first 2,000 characters."""
        language, share = identifier().classify(doc.text[:2000])
        return True if language == self.language and share >= self.share else (False, language)


@lru_cache
def identifier() -> LanguageIdentifier:
    """Tells languages, with probabilities."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Quality(GopherQualityFilter):  # type: ignore[misc]
    """Gopher's rules, or of them only the number of words."""

    name = "quality"

    def __init__(self, settings: Settings, dropped: JsonlWriter) -> None:
        least, most = settings.words
        off = dict.fromkeys(
            (
                "min_avg_word_length", "max_avg_word_length", "max_symbol_word_ratio", "max_bullet_lines_ratio",
                "max_ellipsis_lines_ratio", "max_non_alpha_words_ratio", "min_stop_words",
            )
        )  # fmt: skip
        super().__init__(least, most, exclusion_writer=dropped, **({} if settings.quality else off))


class Decontaminate(BaseFilter):  # type: ignore[misc]
    """Leaves out what shares so many words in a row with an evaluation."""

    name = "decontamination"

    def __init__(self, against: tuple[str, ...], words: int, dropped: JsonlWriter) -> None:
        super().__init__(dropped)
        self.against, self.words = against, words

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Names the evaluation where there is one."""
        known = evaluations(self.against, self.words)
        for run in word_runs(doc.text, self.words):
            if run in known:
                doc.metadata["shared_words"] = " ".join(run)
                return False, known[run]
        return True


def word_runs(text: str, words: int) -> Iterator[tuple[str, ...]]:
    """All runs of so many words in a text, lower case and without marks; a shorter text is one run."""
    found = simplify_text(text).split()
    yield from ngrams(found, words) if len(found) >= words else [tuple(found)] if found else []


@lru_cache(maxsize=1)
def evaluations(names: tuple[str, ...], words: int) -> dict[tuple[str, ...], str]:
    """Every run of words of the evaluations, and one of those that have it; texts that are shorter stand in none."""
    found: dict[tuple[str, ...], str] = {}
    for name in names:
        for text in _evaluated(name):
            found |= {run: name for run in word_runs(text, words) if len(run) == words}
    return found


def _evaluated(name: str) -> Iterable[str]:
    """The texts of an evaluation; of a task every context with its continuation."""
    if name in ASSETS and ASSETS[name].kind == "task":
        rows = read_requests(ASSETS[name].path())
        return (f"{row['request']['context']} {row['request']['continuation']}" for row in rows)
    return read_documents(name)


class Split(PipelineStep):  # type: ignore[misc]
    """Says of every document whether it is learned or set apart."""

    type, name = "split", "split"

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Marks them one by one."""
        for doc in data:
            yield Document(doc.text, doc.id, metadata=doc.metadata | {"split": SPLITS[is_held_out(doc.text, self.share)]})


def _whole_text(doc: Document) -> bytes:
    return str(doc.text).encode()


def run_pipeline(settings: Settings, work: Path, said: Callable[[str], None]) -> list[dict[str, Any]]:
    """Runs all pipelines, or what is left of them.

    Args:
        settings: Of curation.
        work: Folder of what is between the pipelines, and of the marks.
        said: Called with what begins.

    Returns:
        In the order of the filters: its name, documents in and out, and by reason how many it dropped.
    """
    exact = ExactDedupConfig(_whole_text, hash_config=HashConfig(precision=64))
    near = MinhashConfig(
        n_grams=settings.shingle,
        num_buckets=settings.bands,
        hashes_per_bucket=settings.rows,
        hash_config=HashConfig(precision=64),
    )
    place = {
        name: str(work / name) for name in ("clean", "unique", "equal", "equals", "signatures", "pairs", "clusters", "kept")
    }

    def dropped(name: str) -> JsonlWriter:
        return JsonlWriter(str(work / "dropped" / name), FILE, compression=None)

    def reader(name: str) -> JsonlReader:
        return JsonlReader(place[name], compression=None, add_file_path=False)

    def writer(name: str, file: str = FILE) -> JsonlWriter:
        return JsonlWriter(place[name], file, compression=None)

    filters = [Language(settings.language, settings.language_share, dropped("language"))] if settings.language else []
    filters += [Quality(settings, dropped("quality"))]
    if settings.decontaminate:
        filters += [Decontaminate(settings.decontaminate, settings.decontaminate_words, dropped("decontamination"))]
    parts: list[tuple[str, list[PipelineStep], int]] = [
        ("filter", [Read(settings.sources), *filters, writer("clean")], settings.shards),
        ("exact signatures", [reader("clean"), ExactDedupSignature(place["equal"], exact)], settings.shards),
        ("exact pairs", [ExactFindDedups(place["equal"], place["equals"], exact)], 1),
        (
            "exact",
            [reader("clean"), ExactDedupFilter(place["equals"], exact, dropped("exact duplicates")), writer("unique")],
            settings.shards,
        ),
        ("near signatures", [reader("unique"), MinhashDedupSignature(place["signatures"], near)], settings.shards),
        ("near pairs", [MinhashDedupBuckets(place["signatures"], place["pairs"], config=near)], settings.bands),
        ("near clusters", [MinhashDedupCluster(place["pairs"], place["clusters"], config=near)], 1),
        (
            "near",
            [
                reader("unique"), MinhashDedupFilter(place["clusters"], dropped("near duplicates")), Split(settings.held_out),
                writer("kept", "${split}/" + FILE),
            ],
            settings.shards,
        ),
    ]  # fmt: skip
    for name, steps, tasks in parts:
        said(f"curation: {name}")
        _carried_out(steps, work / "marks" / name, tasks, settings.workers)
        if not any((work / "clean").glob("*.jsonl")):  # the filters left nothing to compare
            break
    return _counted(work / "marks", [each.name for each in filters])


def _carried_out(steps: list[PipelineStep], marks: Path, tasks: int, workers: int) -> None:
    """One pipeline; datatrove's own words stay in its logs."""
    executor = LocalPipelineExecutor(steps, tasks=tasks, workers=min(workers, tasks), logging_dir=str(marks))
    marks.mkdir(parents=True, exist_ok=True)
    with said_elsewhere(marks / "said.txt"):
        executor.run()


@contextlib.contextmanager
def said_elsewhere(file: Path) -> Iterator[None]:
    """Errors' stream of this process and of those that it starts goes into a file for a while."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with file.open("a", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
            os.dup2(stream.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _counted(marks: Path, filters: list[str]) -> list[dict[str, Any]]:
    """Of every filter how many documents went in and out, and why the others did not, over all shards."""
    found = []
    wanted = [
        ("filter", "read"),
        *(("filter", name) for name in filters),
        ("exact", "exact duplicates"),
        ("near", "near duplicates"),
    ]
    for pipeline, name in wanted:
        counts: dict[str, int] = {}
        for file in sorted((marks / pipeline / "stats").glob("*.json")):
            for step in json.loads(file.read_text(encoding="utf-8")):
                if name in step["name"] or (name.endswith("duplicates") and "DEDUP" in step["name"]):
                    for label, value in step["stats"].items():
                        counts[label] = counts.get(label, 0) + (value["total"] if isinstance(value, dict) else value)
        reasons = {key.removeprefix("dropped_"): count for key, count in sorted(counts.items()) if key.startswith("dropped_")}
        found.append({"filter": name, "in": counts.get("total", 0), "out": counts.get("forwarded", 0), "reasons": reasons})
    return found
