"""Claim: weights of few bits, executed as integers, are faster than 16 bits in the same engine.

    python benchmarks/export_speed.py

Rounds SmolLM2-135M to four and to eight bits in groups of 32, with inputs of eight, exports it to llama.cpp, OpenVINO and ONNX Runtime, and runs each export beside the dense model there and in PyTorch: prefill of 256
tokens, decoding of 24 after 8, batch 1, all threads; median and range of five repeats, every engine in a process of its own. Also counts the prompts that an export continues as transformers does. Writes
benchmarks/results/export_speed.csv. About 20 minutes on 2 cores, of which half is rounding; nothing else should run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import duramen
import rows
from duramen.assets import open_model
from duramen.evaluate.speed import latency, weight_bytes
from duramen.hardware.clock import PROMPT

CASE = "SmolLM2-135M, batch 1"


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", default=tempfile.mkdtemp())
    options = parser.parse_args()
    work, table = Path(options.work), []
    dense = open_model("smollm2-135m")
    for dtype in (torch.float32, torch.bfloat16):
        found = latency(duramen.load(dense, dtype=dtype))
        seconds = found["prefill_seconds"]
        prefill = {"median": PROMPT / seconds["median"], "low": PROMPT / seconds["high"], "high": PROMPT / seconds["low"]}
        speeds = {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": found["decode_tokens_per_second"]}
        name = str(dtype).removeprefix("torch.")
        _add(table, f"PyTorch, {name}", speeds | {"bytes": weight_bytes(dense)})
    folders = {"dense": str(dense)} | {bits: _rounded(work, bits) for bits in ("W4A8g32 g32", "W8A8g32 g32")}
    for subject, model, form, kind in (
        ("f16", "dense", "gguf", "f16"),
        ("W8A8 (Q8_0)", "W8A8g32 g32", "gguf", "f16"),
        ("W4A8 (Q4_0)", "W4A8g32 g32", "gguf", "f16"),
        ("float32", "dense", "onnx", "float"),
        ("W4, inputs in float", "W4A8g32 g32", "onnx", "float"),
        ("W4A8", "W4A8g32 g32", "onnx", "int8"),
        ("W8A8", "W8A8g32 g32", "onnx", "int8"),
    ):
        out = work / f"{len(table)}{'.gguf' if form == 'gguf' else ''}"
        found = duramen.export(form, folders[model], out, kind=kind)
        for engine, ran in found["ran"].items():
            _add(table, f"{engine}, {subject}", ran | {"bytes": found["bytes"]})
            print(engine, subject, ran, flush=True)
        rows.write("export_speed", table)


def _rounded(work: Path, text: str) -> str:
    """A folder of the model in a format; rounded to nearest, since speed does not depend on codes."""
    out = work / text.replace(" ", "-")
    calibration = {"text": ["squad"], "sequences": 4, "length": 256}
    duramen.run(
        {"name": "rounded", "dtype": "float32", "calibration": calibration, "steps": [{"method": "rtn", "format": text}]},
        "smollm2-135m",
        out,
    )
    return str(out)


def _add(table: list[dict[str, object]], subject: str, found: dict) -> None:
    """The rows of one subject; its peer is the 16 bits, or the float, of the same engine."""
    engine = subject.partition(",")[0]
    for metric, unit, key in (
        ("prefill tokens per second", "1/s", "prefill_tokens_per_second"),
        ("decoded tokens per second", "1/s", "decode_tokens_per_second"),
    ):
        peer = next((row for row in table if str(row["subject"]).startswith(engine) and row["metric"] == metric), None)
        against = {"peer": peer["subject"], "peer_value": peer["value"]} if peer else {}
        spread = found[key]
        table.append(
            rows.row(
                CASE, metric, unit, subject, spread["median"], low=spread["low"], high=spread["high"], samples=5, **against
            )
        )
    figures = {"file, MiB": found["bytes"] / 2**20}
    if "peak_memory_bytes" in found:
        figures |= {"memory, MiB": found["peak_memory_bytes"] / 2**20, "prompts continued alike, of 20": found["agreed"]}
    table += [rows.row(CASE, metric, "1", subject, float(value), samples=1) for metric, value in figures.items()]


if __name__ == "__main__":
    main()
