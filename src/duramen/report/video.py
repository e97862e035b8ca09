"""The report of a video: its frames, what memory it took and would have taken, and how near few steps are to all of them."""

from __future__ import annotations

import base64
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

from duramen.hardware.machine import byte_unit, bytes_told
from duramen.report.charts import courses_chart
from duramen.report.page import render
from duramen.rundir import write_text

STRIP, POINTS = 16, 240
"""Frames that are shown, and points of a curve."""


def write_video_report(
    folder: Path, results: dict[str, Any], images: list[Any], curves: list[tuple[list[int], list[int]]]
) -> Path:
    """Writes ``report.html``.

    Args:
        folder: Where the video is.
        results: Content of ``video.json``.
        images: The frames, as PIL has them.
        curves: Bytes alive after every operator, without slices and in them, for each network that was planned.
    """
    count = min(STRIP, len(images))
    shown = [number * (len(images) - 1) // max(count - 1, 1) for number in range(count)]
    page = render(
        "video.html.jinja",
        results=results,
        verdict=video_verdict(results),
        strip=[{"number": number + 1, "source": _png(images[number])} for number in shown],
        memory=[_memory(told, *each) for told, each in zip(results["plans"], curves, strict=True)],
        schedule=_schedule(results),
    )  # fmt: skip
    file = folder / "report.html"
    write_text(file, page)
    return file


def video_verdict(results: dict[str, Any]) -> str:
    """What happened, in a few sentences."""
    clip, wish, schedule = results["clip"], results["wish"], results["schedule"]
    parts = [
        f"{results['frames']} frames of {clip['width']}x{clip['height']} pixels in {results['seconds']:.3g} seconds, {results['denoised']} of {wish['steps']} denoising steps in full."
    ]
    if results["plans"]:
        most, plain = (max(plan[key] for plan in results["plans"]) for key in ("peak", "plain"))
        parts.append(f"Activations take {bytes_told(most)} at most, {most / plain:.2f} of what they would without slices.")
    if text := results["text_encoder"]:
        sizes = " instead of ".join(bytes_told(text["bytes"][key]) for key in ("after", "before"))
        parts.append(
            f"The text encoder takes {sizes} in eight bits, which moves what it says of the prompt by {text['moved']:.2%}."
        )
    if schedule:
        parts.append(
            f"A full run stands {schedule['quality']:.1f} dB above its distance from these steps, on the seeds that chose them."
        )
        apart = schedule["from_even"]
        nearer = apart["high"] < 0
        parts.append(
            f"The schedule “{schedule['name']}” is nearer to the full run than plain fewer steps, by {-apart['value']:.3g} ({-apart['high']:.3g} to {-apart['low']:.3g})."
            if nearer
            else "No schedule is measurably nearer to the full run than plain fewer steps, which were taken."
        )
    return " ".join(parts)


def _memory(told: dict[str, Any], plain: list[int], sliced: list[int]) -> dict[str, str]:
    unit, name = byte_unit(told["plain"])
    piece = told["piece"]
    size = "whole" if piece is None else f"{piece / 2**20:,.3g} MiB"
    return {
        "network": told["network"],
        "peak": bytes_told(told["peak"]),
        "plain": bytes_told(told["plain"]),
        "share": f"{told['peak'] / told['plain']:.2f}",
        "piece": size,
        "chart": courses_chart(_course(plain, unit), _course(sliced, unit), "share of the pass", f"{name} alive"),
    }


def _schedule(results: dict[str, Any]) -> dict[str, Any] | None:
    found = results["schedule"]
    if found is None:
        return None
    rows = [
        {"name": name, "error": f"{sum(errors) / len(errors):.4f}", "range": f"{min(errors):.4f} to {max(errors):.4f}", "chosen": name == found["name"]}
        for name, errors in sorted(found["errors"].items(), key=lambda each: sum(each[1]))
    ]  # fmt: skip
    marks = [{"number": step + 1, "full": step in found["full"]} for step in range(results["wish"]["steps"])]
    return {"rows": rows, "marks": marks, "seeds": len(next(iter(found["errors"].values())))}


def _course(curve: list[int], unit: int) -> list[tuple[float, float]]:
    """The most of every stretch of a pass, so that no peak is lost."""
    count = min(POINTS, len(curve))
    ends = [number * len(curve) // count for number in range(count + 1)]
    return [(low / len(curve), max(curve[low:high]) / unit) for low, high in pairwise(ends)]


def _png(image: Any) -> str:
    """A frame for the page, no larger than needed to be seen."""
    small = image.copy()
    small.thumbnail((256, 256))
    stream = io.BytesIO()
    small.save(stream, "png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
