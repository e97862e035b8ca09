"""The models that training needs: the student whole in memory, the dense model that it looks up to, and the text that both read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from duramen.assets import open_model
from duramen.calibrate.walker import Walk, set_aside
from duramen.families.model import BlockModel, Model
from duramen.problem import Problem
from duramen.rounding import start_rounding, take_over_rounding
from duramen.rundir import read_formats
from duramen.ssm.mixer import ExactScans
from duramen.train.data import Rows, keeps_apart, read_rows
from duramen.train.loop import History, Task, recomputed, train
from duramen.train.settings import TrainSettings

ENOUGH = 0.5
"""Share of the block parameters below which the coverage is too small to pass without a word."""


@dataclass(frozen=True)
class Course:
    """What a training run works with.

    Attributes:
        network: The student, whole.
        teacher: The dense model, whole and frozen; None where only the text is learned.
        rows: What is trained on.
        aside: Held out.
    """

    network: nn.Module
    teacher: nn.Module | None
    rows: Rows
    aside: Rows


def open_course(model: BlockModel, tokens: Tensor, settings: TrainSettings, walk: Walk, given: Model | None) -> Course:
    """Brings together what training needs.

    Args:
        model: The student, block by block.
        tokens: Token ids to learn where the settings name no examples, [S, T].
        settings: Objective, examples, share that is held out.
        walk: Knows the folder that the recipe began with, if an earlier step has edited it since.
        given: The dense model, in memory.

    Raises:
        Problem: If the dense model is missing or does not fit, or there are too few sequences.
    """
    network, teacher = whole(model), find_teacher(model, settings, walk, given)
    rows = _rows([each for each in (network, teacher) if each is not None], model, tokens, settings).to(model.device)
    aside = set_aside(len(rows), settings.held_out, "held_out").to(model.device)
    return Course(network, teacher, rows[~aside], rows[aside])


def teach(
    course: Course, task: Task, groups: Sequence[dict[str, Any]], settings: TrainSettings, model: BlockModel, walk: Walk
) -> History:
    """Trains the student, its state-space layers on our scans and its blocks recomputed where the settings say so.

    Args:
        course: Has the student.
        task: What is trained on.
        groups: Parameters with their learning rates, as for AdamW.
        settings: How long and how fast.
        model: The student, block by block.
        walk: Says where checkpoints are kept, and whom to tell.
    """
    inside = course.network.get_submodule(model.family.blocks).children()
    with ExactScans(course.network), recomputed(inside, wanted=settings.recompute):
        return train(groups, task, settings.schedule, folder=walk.folder, tell=walk.told)


def summary(
    model: BlockModel,
    weights: Sequence[Tensor],
    groups: Sequence[dict[str, Any]],
    history: History,
    *,
    rate: float,
    distilled: bool,
) -> dict[str, Any]:
    """For the report: what was trained, and how the loss went.

    Args:
        model: The student.
        weights: Those that changed.
        groups: What was trained.
        history: How it went.
        rate: The learning rate, at its height.
        distilled: Whether there was a teacher.
    """
    inside = f"{model.family.blocks}."
    everything = sum(p.numel() for name, p in model.network.named_parameters() if name.startswith(inside))
    covered = sum(weight.numel() for weight in weights) / everything
    return {
        "layers": len(weights), "covered": covered, "thin": covered < ENOUGH,
        "trained_parameters": sum(p.numel() for group in groups for p in group["params"]), "learning_rate": rate, "distilled": distilled,
        "losses": history.losses, "held_out": history.held_out, "terms": history.terms, "best": history.best,
    }  # fmt: skip


def find_parent(model: BlockModel, name: str, walk: Walk, given: Model | None) -> BlockModel | None:
    """The dense model: the one given in memory, the one named, or what the recipe began with; None where there is none.

    Args:
        model: The model that looks up to it; the dense one runs in the same type.
        name: Folder, embedded name, GGUF file or hub id; may be empty.
        walk: Knows the folder that the recipe began with, if an earlier step has edited it since.
        given: In memory.
    """
    if given is not None:
        return BlockModel.of(given)
    folder = open_model(name) if name else walk.parent
    if folder is None:
        return None
    return BlockModel.from_folder(folder, dtype=model.dtype, device=model.device, allow_generic=True)


def find_teacher(model: BlockModel, settings: TrainSettings, walk: Walk, given: Model | None) -> nn.Module | None:
    """The dense model, whole; None where only the text is learned.

    Raises:
        Problem: If there is none to distil from, or it has another vocabulary.
    """
    if settings.objective == "ce":
        return None
    dense = find_parent(model, settings.parent, walk, given)
    if dense is None:
        if settings.objective == "auto":
            return None
        raise Problem(
            "There is no dense model to distil from.",
            why="this recipe begins with the model that is to be recovered.",
            fix="`parent: MODEL`, or `objective: ce`.",
        )
    if dense.config.vocab_size != model.config.vocab_size:
        raise Problem(
            f"The dense model has {dense.config.vocab_size:,} tokens, this one {model.config.vocab_size:,}.",
            why="their distributions cannot be compared.",
            fix="a `parent` with the same tokenizer, or `objective: ce`.",
        )
    return whole(dense)


def whole(model: BlockModel) -> nn.Module:
    """The network in memory, with all its blocks; it rounds what the model rounds."""
    from transformers import AutoModelForCausalLM

    if model.checkpoint is None:
        return model.network
    folder = model.checkpoint.folder
    network: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    start_rounding(network, read_formats(folder))
    return network.to(model.device)


@contextmanager
def replaced(network: nn.Module) -> Iterator[Callable[[str, nn.Module], None]]:
    """A network in which modules may be put in the place of others, by their full names, and all else is frozen, for a while; they round the inputs that the others round."""
    trained = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    before: dict[str, nn.Module] = {}

    def put(name: str, module: nn.Module) -> None:
        before[name] = network.get_submodule(name)
        take_over_rounding(before[name], module)
        network.set_submodule(name, module)

    try:
        network.requires_grad_(False)
        yield put
    finally:
        for name, module in before.items():
            network.set_submodule(name, module)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(trained[name])


def _rows(readers: Sequence[nn.Module], model: BlockModel, tokens: Tensor, settings: TrainSettings) -> Rows:
    """What is learned: the recipe's text, or the examples of ``data`` in rows as long, packed if all who read them can keep them apart."""
    if not settings.data:
        return Rows.whole(tokens)
    if model.checkpoint is None:
        raise Problem(
            "`data` needs a tokenizer, and a model in memory has none.",
            why="examples are text.",
            fix="the model's folder, or token ids without `data`.",
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.checkpoint.folder)
    packed = all(keeps_apart(network, model.config.vocab_size) for network in readers)
    return read_rows(settings.data, tokenizer, tokens.shape[1], packed=packed)
