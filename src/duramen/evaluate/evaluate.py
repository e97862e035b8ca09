"""Measures a model before and after: perplexity, divergence from dense, tasks, generations, sizes and latency.

Both models see the same tokens, so differences are paired. Each part is kept as soon as it is measured. Definitions are in
``perplexity.py`` (disjoint windows, no BOS), ``likelihood.py`` (one scorer for all tasks) and ``intervals.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from duramen.assets import find_text, get_asset
from duramen.calibrate.tokens import evaluation_tokens, opening
from duramen.evaluate import likelihood, perplexity, speed
from duramen.families.model import BlockModel
from duramen.intervals import Measured, mean_interval, mean_of, paired_interval, wilson_interval
from duramen.opening import load, open_blocks
from duramen.problem import Exit, Problem
from duramen.registry import Place, method
from duramen.registry import Settings as MethodSettings

Memo = Callable[[str, Callable[[], Any]], Any]
"""(key, compute) -> the result, from an earlier run if it is kept."""


TASK_SETS = {
    "commonsense": (
        "boolq_questions", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ),
}  # fmt: skip
"""Names for several tasks, whose mean is reported too; ``commonsense`` are the eight of LLM-Adapters (arXiv 2304.01933)."""


class Settings(MethodSettings):
    """Settings of an evaluation."""

    text: tuple[Place, ...] = ("boolq",)
    """Texts for perplexity and divergence: embedded names or files. None of them may be a calibration text."""
    length: int = Field(default=1024, ge=2)
    """Tokens per window; windows are disjoint."""
    context: int = Field(default=0, ge=0)
    """Tokens at the beginning of every window that are read and not scored; needed where prompts are shortened, which these are then."""
    windows: int | None = Field(default=16, ge=1)
    """Windows per text, from its start; null takes the whole text."""
    tasks: tuple[str, ...] = ()
    """Embedded likelihood tasks: arc_challenge, arc_easy, boolq_questions, commonsense_qa, hellaswag, lambada, openbookqa, piqa, sciq, social_iqa, winogrande, and with five examples before each document arc_challenge_5shot, arc_easy_5shot, hellaswag_5shot, piqa_5shot, winogrande_5shot; or `commonsense` for the eight that are often averaged."""
    documents: int = Field(default=100, ge=1)
    """Documents per task, from the start."""
    prompts: tuple[str, ...] = ("The heartwood of a tree is", "Q: What is the capital of France?\nA:")
    """Prompts for greedy generations, side by side."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens per generation."""
    latency: bool = True
    """Whether to measure prefill and decode on this machine."""

    @model_validator(mode="after")
    def _something_is_scored(self) -> Settings:
        if self.context >= self.length:
            raise ValueError(f"a context of {self.context} leaves nothing to score of windows of {self.length}")
        names = [Path(text).stem for text in self.text]
        if len(set(names)) < len(names):
            raise ValueError(f"two texts would both be called `{next(name for name in names if names.count(name) > 1)}`")
        return self

    def task_names(self) -> list[str]:
        """Every task once, those of sets one by one."""
        return list(dict.fromkeys(task for name in self.tasks for task in TASK_SETS.get(name, (name,))))


@dataclass(frozen=True)
class Subject:
    """A model under evaluation: its folder, opened block by block, with its tokenizer."""

    folder: Path
    model: BlockModel
    tokenizer: Any


def open_subject(folder: Path, **options: Any) -> Subject:
    """Opens a model folder for evaluation; the options are those of ``BlockModel.from_folder``."""
    from transformers import AutoTokenizer

    return Subject(folder, open_blocks(folder, **options), AutoTokenizer.from_pretrained(folder))


def _no_memo(key: str, compute: Callable[[], Any]) -> Any:
    return compute()


@method("evaluate", title="Evaluation", paper="documented in evaluate/", kind="evaluate", settings=Settings)
def apply(subjects: dict[str, Subject], *, memo: Memo = _no_memo, **settings: object) -> dict[str, Any]:
    """Measures one model, or a dense and an edited one side by side.

    Args:
        subjects: ``{"before": dense, "after": edited}``, or one of them.
        memo: Keeps finished parts.
        **settings: See ``Settings``.

    Returns:
        The measurements, as in ``results.json`` (docs: results).
    """
    chosen = Settings.model_validate(settings)
    check_there(chosen)
    _check_alike(subjects)
    measured: dict[str, Any] = {"perplexity": {}, "tasks": {}}
    for text in chosen.text:
        name = Path(text).stem
        measured["perplexity"][name] = memo(f"perplexity-{name}", partial(_texts, subjects, text, chosen))
    for task in chosen.task_names():
        measured["tasks"][task] = memo(f"task-{task}", partial(_task, subjects, task, chosen.documents))
    for name in set(chosen.tasks) & TASK_SETS.keys():
        measured["tasks"][f"{name}, mean"] = _mean([measured["tasks"][task] for task in TASK_SETS[name]])
    measured["bytes_on_disk"] = {name: speed.weight_bytes(subject.folder) for name, subject in subjects.items()}
    measured |= memo("loaded", partial(_loaded, subjects, chosen))
    return measured


def check_there(settings: Settings) -> None:
    """Stops if a task or text is not there, before anything is measured."""
    for task in settings.task_names():
        get_asset(task, "task").path()
    for text in settings.text:
        if not Path(text).is_file():
            find_text(text)


def check_texts(settings: Settings, calibration: tuple[str, ...]) -> None:
    """Stops if a text would be both calibrated and evaluated on."""
    both = sorted({_place(text) for text in settings.text} & {_place(text) for text in calibration})
    if both:
        raise Problem(
            f"{', '.join(both)} is both calibration and evaluation text.",
            why="a model fitted to the text that it is judged by looks better than it is.",
            fix="another `text` in the evaluate step, or another calibration text.",
        )


def _check_alike(subjects: dict[str, Subject]) -> None:
    """Stops if two models do not read the same tokens.

    Raises:
        Problem: Then.
    """
    vocabularies = [each.tokenizer.get_vocab() for each in subjects.values()]
    widths = [each.model.config.get_text_config().vocab_size for each in subjects.values()]
    if any(each != vocabularies[0] for each in vocabularies) or len(set(widths)) > 1:
        raise Problem(
            f"{' and '.join(each.folder.name for each in subjects.values())} have other vocabularies.",
            why="they would be compared token by token, on distributions over the same tokens.", fix="two models with one tokenizer.",
            code=Exit.INCOMPATIBLE,
        )  # fmt: skip


def _place(text: str) -> str:
    """A file by its whole path, whichever way it was written; an embedded text by its name."""
    return str(Path(text).resolve()) if Path(text).is_file() else text


def _texts(subjects: dict[str, Subject], text: str, settings: Settings) -> dict[str, Any]:
    any_subject = next(iter(subjects.values()))
    windows = evaluation_tokens(any_subject.tokenizer, text, length=settings.length, windows=settings.windows)
    hidden = {name: perplexity.final_hidden(subject.model, windows, settings.context) for name, subject in subjects.items()}
    found: dict[str, Any] = {
        "length": settings.length, "stride": settings.length, "context": settings.context, "windows": len(windows),
    }  # fmt: skip
    if len(subjects) == 1:
        (name,) = subjects
        losses = perplexity.token_losses(subjects[name].model, hidden[name], windows, settings.context)
        return found | {name: perplexity.perplexity(losses.mean(1).double().numpy()).as_dict()}
    return found | _paired(subjects, hidden, windows, settings.context)


def _paired(subjects: dict[str, Subject], hidden: dict[str, list[Tensor]], windows: Tensor, context: int) -> dict[str, Any]:
    dense, edited = subjects["before"].model, subjects["after"].model
    before = perplexity.token_losses(dense, hidden["before"], windows, context).mean(1).double().numpy()
    after = perplexity.divergence(dense, hidden["before"], edited, hidden["after"], windows, context)
    figures = {
        "before": perplexity.perplexity(before),
        "after": perplexity.perplexity(after.loss),
        "ratio": mean_interval(after.loss - before, transform=np.exp),
        "kl": mean_interval(after.kl),
        "agreement": mean_interval(after.agreement),
    }
    return {name: figure.as_dict() for name, figure in figures.items()}


def _task(subjects: dict[str, Subject], task: str, documents: int) -> dict[str, Any]:
    found: dict[str, Any] = {"documents": documents}
    right: dict[str, likelihood.TaskScores] = {}
    for name, subject in subjects.items():
        requests = likelihood.load_requests(task, subject.tokenizer, documents)
        right[name] = likelihood.grade(requests, likelihood.score_requests(subject.model, requests))
        found[name] = {
            "acc": wilson_interval(right[name].acc).as_dict(),
            "acc_norm": wilson_interval(right[name].acc_norm).as_dict(),
        }
    if len(subjects) == 2:
        difference: Measured = paired_interval(right["before"].acc, right["after"].acc)
        found["difference"] = difference.as_dict()
    return found


def _mean(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several tasks, each task counting the same."""

    def mean(*keys: str) -> dict[str, float | int]:
        figures = [Measured(**reduce(dict.__getitem__, keys, task)) for task in tasks]
        return mean_of(figures).as_dict()

    found: dict[str, Any] = {"documents": sum(task["documents"] for task in tasks)}
    for name in [each for each in ("before", "after") if each in tasks[0]]:
        found[name] = {key: mean(name, key) for key in ("acc", "acc_norm")}
    return found | ({"difference": mean("difference")} if "difference" in tasks[0] else {})


def _loaded(subjects: dict[str, Subject], settings: Settings) -> dict[str, Any]:
    """What needs the whole model in memory: generations, latency, bytes in memory. Models are loaded one after another."""
    found: dict[str, Any] = {"generations": {}, "latency": {}, "bytes_in_memory": {}}
    if not (settings.prompts or settings.latency):
        return found
    for name, subject in subjects.items():
        network = load(subject.folder, dtype=subject.model.dtype).to(subject.model.device)
        found["bytes_in_memory"][name] = speed.memory_bytes(network)
        for prompt in settings.prompts:
            text = _continue(network, subject.tokenizer, prompt, settings.new_tokens)
            found["generations"].setdefault(prompt, {})[name] = text
        if settings.latency:
            found["latency"][name] = speed.latency(network)
    return found


@torch.no_grad()
def _continue(network: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    rows = [opening(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    ids = torch.tensor(rows, device=network.device)
    out = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
        pad_token_id=tokenizer.eos_token_id or 0,
    )  # fmt: skip
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
