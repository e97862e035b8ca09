"""Progress of a run: one display that is renewed in a terminal, one plain line per event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from duramen.hardware.machine import current_memory, peak_memory

Report = Callable[[str, dict[str, Any]], None]


@contextmanager
def display() -> Iterator[Report]:
    """Gives the callback for ``api.run``."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} blocks"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _renewed(progress)


def describe(event: str, fields: dict[str, Any]) -> str:
    """One line for one event."""
    if event == "step":
        return f"step {fields['number'] + 1}/{fields['of']}: {fields['method']}"
    if event == "layer":
        return f"{fields['layer']}: {fields['removed']:,} of {fields['size']:,} removed, error {fields['relative_error']:.4f}"
    if event == "evaluating":
        return f"evaluating: {fields['part']}"
    if event == "trained":
        return f"{fields['steps']} steps: held-out loss {fields['loss']:.4f}"
    if event == "changed":
        return "goes on with other steps than before:\n    " + "\n    ".join(fields["steps"])
    if event == "skipped":
        named = "\n".join(f"    {file}: {why}" for file, why in fields["files"].items())
        return f"{len(fields['files'])} files cannot be read and are left out:\n{named}"
    if event == "part":
        return f"{fields['part']}: done"
    if event == "saved":
        return f"saved and reopened with {fields['how']}: logits differ by at most {fields['largest_difference']:.2g}"
    return f"{'already done' if fields['again'] else 'done'}: {fields['out']}"


def _plain_lines() -> Report:
    start = time.monotonic()
    errors: list[dict[str, Any]] = []

    def line(text: str) -> None:
        print(f"[{time.monotonic() - start:6.0f} s, {current_memory() / 2**30:.1f} GiB] {text}", file=sys.stderr, flush=True)

    def close_block() -> None:
        """Says that the block whose layers came last is done."""
        if errors:
            mean = sum(layer["relative_error"] for layer in errors) / len(errors)
            line(f"block {errors[-1]['block'] + 1}/{errors[-1]['blocks']} done, mean error {mean:.4f}")
            errors.clear()

    def show(event: str, fields: dict[str, Any]) -> None:
        if event == "layer":
            if errors and errors[-1]["block"] != fields["block"]:
                close_block()
            errors.append(fields)
            return
        close_block()
        line(describe(event, fields))

    return show


def _renewed(progress: Progress) -> Report:
    tasks: list[Any] = []

    def show(event: str, fields: dict[str, Any]) -> None:
        if event == "layer":
            if not tasks:
                tasks.append(progress.add_task("", total=fields["blocks"]))
            memory = f"{current_memory() / 2**30:.1f} GiB, peak {peak_memory() / 2**30:.1f}"
            text = f"{fields['layer']}  error {fields['relative_error']:.4f}  {memory}"
            progress.update(tasks[0], completed=fields["block"], description=text)
            return
        for task in tasks:
            progress.remove_task(task)
        tasks.clear()
        progress.console.print(describe(event, fields))

    return show
