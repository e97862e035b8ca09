"""What tuning on TRL has in common: a stop at any moment goes on to the bit, every optimizer step moves the schedule once, and a plain folder comes out.

TRL and transformers keep weights, moments, schedule, generators and the place in the data; here a checkpoint counts only once the hashes of all its files stand beside them, so that one
that was cut off is never taken. The loss is per token over a whole step, however it is divided. They run on the processor and on GPUs, under torchrun too.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from duramen.calibrate import ranks
from duramen.hardware.machine import forward_dtype
from duramen.problem import Exit, Problem, need
from duramen.reading import read_lines
from duramen.registry import Place
from duramen.registry import Settings as Base
from duramen.rundir import hash_folder, write_json
from duramen.train.checkpoint import MANIFEST, damaged
from duramen.train.exercises import EXERCISES, answered, exercises_file
from duramen.train.folder import check_vocabulary, gathered, open_causal, save_causal
from duramen.train.stage import MODEL, Stage


class TuningSettings(Base):
    """What every stage takes that tunes a model on TRL."""

    data: Place
    """What is learned."""
    model: Place = ""
    """Folder of the model; empty for that of the stage before."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """Of AdamW at its height."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the rate rises; then it falls to zero in a line."""
    batch: Annotated[int, Field(ge=1)] = 16
    """Examples of a step, over all processes."""
    at_once: Annotated[int, Field(ge=1)] = 16
    """Examples that run together; the gradients of a step's parts add up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of all parameters but norms and biases."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of a step's gradient."""
    every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints."""
    dtype: Annotated[str, Field(pattern="^(auto|float32|bfloat16)$")] = "auto"
    """Of what is computed; weights and moments stay in float32."""
    recompute: bool = False
    """Whether blocks run again in the backward pass instead of keeping what is inside them."""
    seed: int = 0
    """Of the order of the examples and of what is drawn."""
    examples: Annotated[int, Field(ge=0)] = 0
    """The first so many examples; 0 for all."""
    measure: Annotated[int, Field(ge=0)] = 0
    """Held-out exercises that are answered before and after, where `data` are exercises; 0 for none."""

    @property
    def parts(self) -> int:
        """Parts of a step on every process.

        Raises:
            Problem: If the batch cannot be divided so.
        """
        together = self.at_once * ranks.count()
        if self.batch % together:
            raise Problem(
                f"A batch of {self.batch} cannot be run {self.at_once} at once by {ranks.count()} processes.", why="all parts are equal.",
                fix="an `at_once` that divides it.",
            )  # fmt: skip
        return self.batch // together

    def arguments(self, folder: Path) -> dict[str, Any]:
        """The same in transformers' words."""
        half = forward_dtype(self.dtype) == torch.bfloat16
        return {
            "output_dir": str(folder), "per_device_train_batch_size": self.at_once, "per_device_eval_batch_size": self.at_once,
            "gradient_accumulation_steps": self.parts, "learning_rate": self.learning_rate, "lr_scheduler_type": "linear",
            "warmup_steps": self.warmup, "weight_decay": self.weight_decay, "max_grad_norm": self.clip,
            "bf16": half, "activation_checkpointing": self.recompute, "save_steps": self.every, "save_total_limit": 2, "logging_steps": 1,
            "report_to": [], "disable_tqdm": True, "seed": self.seed, "data_seed": self.seed, "use_cpu": not torch.cuda.is_available(),
        }  # fmt: skip


class ExampleSettings(TuningSettings):
    """What every stage takes that learns examples as they are."""

    epochs: Annotated[float, Field(gt=0)] = 1
    """How often the examples are seen."""
    length: Annotated[int, Field(ge=8)] = 512
    """Most tokens of an example."""
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the examples that are not learned."""

    def arguments(self, folder: Path) -> dict[str, Any]:
        """The same in transformers' words."""
        return super().arguments(folder) | {"num_train_epochs": self.epochs}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the bars of datasets, and the warnings that TRL and transformers give each other."""
    import datasets

    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def opened(stage: Stage, settings: TuningSettings) -> tuple[Any, Any, Path]:
    """The model that is tuned, its tokenizer, and their folder.

    Raises:
        Problem: If there is none, or they do not fit.
    """
    from transformers import AutoTokenizer

    folder = Path(settings.model) if settings.model else stage.need(MODEL, "tuning")
    network, tokenizer = open_causal(folder), AutoTokenizer.from_pretrained(folder)
    check_vocabulary(network.config, len(tokenizer))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return network, tokenizer, folder


def tuned(
    stage: Stage, settings: TuningSettings, make: Callable[[Any, Any, str, Stage, Any], tuple[Any, dict[str, Any]]]
) -> dict[str, Any]:
    """Tunes the model of a stage with a trainer of TRL, and writes ``model``.

    Args:
        stage: Has the model.
        settings: What all tuning takes.
        make: Of model, tokenizer, file of the data, stage and settings the trainer, not yet run, and counts for the report.

    Returns:
        The counts, what ``tune`` returns, and what exercises the model could do before and after.

    Raises:
        Problem: If TRL is not installed, or what ``make`` and ``tune`` raise.
    """
    need("Tuning", "trl", install='"duramen[train]"')
    with quietly():
        network, tokenizer, folder = opened(stage, settings)
        before = answered(network, tokenizer, settings.measure, settings.seed)
        file = exercises_file(stage.folder, settings.seed) if settings.data == EXERCISES else settings.data
        with contextlib.redirect_stderr(io.StringIO()):  # TRL shows bars of its own while it reads the data
            trainer, counts = make(network, tokenizer, file, stage, settings)
        found = tune(stage, trainer, folder)
        after = answered(trainer.model, tokenizer, settings.measure, settings.seed)
    return counts | found | {"exercises": {"before": before, "after": after} if settings.measure else None}


def tune(stage: Stage, trainer: Any, source: Path) -> dict[str, Any]:
    """Trains, or goes on, and writes ``model``.

    Args:
        stage: Says where.
        trainer: Of TRL, not yet run.
        source: Folder with the tokenizer's files.

    Returns:
        Steps, losses, rates and what else was logged, by name, and the held-out losses.

    Raises:
        Problem: If a loss is not finite, or the disk is full.
    """
    from transformers import PrinterCallback, TrainerCallback

    work = Path(trainer.args.output_dir)

    class Marks(TrainerCallback):  # type: ignore[misc]
        """Says when a checkpoint is whole, and stops at a loss that is not finite."""

        def on_save(self, args: Any, state: Any, *_: Any, **more: Any) -> None:
            ranks.wait()
            if ranks.leads():
                place = work / f"checkpoint-{state.global_step}"
                write_json(place / MANIFEST, hash_folder(place))

        def on_log(self, args: Any, state: Any, *_: Any, logs: dict[str, float], **more: Any) -> None:
            loss = logs.get("loss", 0.0)
            if not math.isfinite(loss):
                raise Problem(
                    f"The loss of step {state.global_step} is {loss}.", why="the learning rate is too high, or the model overflows in this type.",
                    fix="half the `learning_rate`, or `dtype: float32`, and another OUT folder.", code=Exit.CHECK_FAILED,
                )  # fmt: skip
            if "eval_loss" in logs:
                stage.told(state.global_step, float(logs["eval_loss"]))

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Marks())
    newest = ranks.shared(str(whole_checkpoint(work, stage.said) or "") if ranks.leads() else None)
    trainer.train(resume_from_checkpoint=newest or None)
    history = trainer.state.log_history
    network = trainer.accelerator.unwrap_model(trainer.model)
    state = gathered(network)
    if ranks.leads():
        save_causal(network, stage.folder / MODEL, source, state)
    ranks.wait()
    logged: dict[str, list[float]] = {}
    for entry in history:
        if "loss" in entry:
            for key, value in entry.items():
                if isinstance(value, int | float) and key not in ("step", "epoch", "step_time"):
                    logged.setdefault(key, []).append(float(value))
    held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    return {"steps": trainer.state.global_step, "losses": logged.get("loss", []), "logged": logged, "held_out": held_out}


def whole_checkpoint(work: Path, said: Callable[[str], None]) -> Path | None:
    """The newest checkpoint all of whose files are what was written; others are removed."""
    for place in sorted(work.glob("checkpoint-*"), key=lambda each: -int(each.name.rpartition("-")[2])):
        wrong = damaged(place)
        if not wrong:
            return place
        said(f"{place.name} is not whole ({wrong}); going on from the one before it")
        shutil.rmtree(place)
    return None


def read_pairs(file: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a jsonl file that have all these fields.

    Args:
        file: The file.
        fields: Their names.

    Raises:
        Problem: If there is no such file, or a line lacks one; it is named by its number.
    """
    place, wanted = Path(file), ", ".join(f"`{field}`" for field in fields)
    if not place.is_file():
        raise Problem(f"There is no file {place}.", why="`data` names the examples.", fix=f"a jsonl file with {wanted}.")
    rows = []
    for number, line in read_lines(place):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _no_row(place, number, f"it is no JSON: {error}", wanted) from None
        missing = [field for field in fields if not isinstance(row, dict) or field not in row or row[field] in ("", [], None)]
        if missing:
            raise _no_row(place, number, f"it has no {', '.join(f'`{field}`' for field in missing)}", wanted)
        rows.append(row)
    if len(rows) < 2:
        raise Problem(f"{place} has {len(rows)} examples.", why="some are learned and some held out.", fix="more of them.")
    return rows


def _no_row(place: Path, number: int, why: str, wanted: str) -> Problem:
    return Problem(
        f"Line {number} of {place.name} is no example.", why=f"{why}.", fix=f"one JSON object a line, with {wanted}."
    )


def divided(rows: list[Any], settings: ExampleSettings) -> tuple[list[Any], list[Any]]:
    """Rows that are learned, and evenly spread ones that are not, of the first ones."""
    rows = rows[: settings.examples or None]
    every = min(max(2, round(1 / settings.held_out)), len(rows))
    return [row for number, row in enumerate(rows) if number % every != every - 1], rows[every - 1 :: every]


def as_turns(tokenizer: Any, prompt: Any, answer: Any) -> tuple[Any, Any]:
    """A prompt and its answer as turns where the tokenizer has a chat template, else as text with its end.

    Raises:
        Problem: If one is neither text nor turns, or the tokenizer does not know how turns are written.
    """
    odd = next((each for each in (prompt, answer) if not isinstance(each, str | list)), None)
    if odd is not None:
        raise Problem(f"An example has {odd!r} where a text or turns should be.", why="it is neither.", fix="quotes around it.")
    if not isinstance(prompt, str) or not isinstance(answer, str):
        if not tokenizer.chat_template:
            raise Problem(
                "The examples are turns, and the tokenizer has no chat template.", why="nothing says how turns are written.",
                fix="examples as texts, or a tokenizer with a template.",
            )  # fmt: skip
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return asked, [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if tokenizer.chat_template:
        return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    return prompt, answer + (tokenizer.eos_token or "")
