"""Claim: methods that follow one another lie beyond what each reaches alone.

    python benchmarks/compositions.py OUT --text wiki.test.raw
    python benchmarks/compositions.py OUT --text wiki.test.raw --groups "W3 g64" --subjects "gptq" "rotate, gptq"
    python benchmarks/compositions.py OUT --text wiki.test.raw --speeds      # of the exports in OUT, on a machine that does nothing else

Runs recipes on SmolLM2-135M, all from the same calibration tokens, and measures KL from the dense model and perplexity on the same windows, the size of what was touched as a share of 16 bits, and the
processor seconds of the whole run. Those of ``W3 g64`` end at the same bits a weight. Those of ``llama.cpp`` end as GGUF: bytes of the file, and with ``--speeds`` its prompt and decode tokens per second, the
files by turns in three rounds. Writes benchmarks/results/compositions.csv after every run; runs that stand there are left out. Ten minutes a rounding and thirty a training on 1 thread.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

import duramen
import rows
from duramen.export.engine import run_engine
from duramen.report.overview import summarise

ROUNDED = {"method": "gptq", "format": "W3 g64"}
FOUR = {"method": "gptq", "format": "W4 g32"}
HEALED = {"method": "rora", "steps": 40, "batch": 4, "at_once": 2, "rank": 16, "every": 20}
CUT = {"method": "fusion", "ratio": 0.2, "allocation": "local"}
ROTATED = {"method": "rotate"}


def _gguf(kind: str) -> dict[str, str]:
    return {"method": "export", "form": "gguf", "type": kind}


GROUPS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "W3 g64": {
        "gptq": [ROUNDED],
        "rtn": [{"method": "rtn", "format": "W3 g64"}],
        "rotate, gptq": [ROTATED, ROUNDED],
        "gptq, rora": [ROUNDED, HEALED],
        "rotate, gptq, rora": [ROTATED, ROUNDED, HEALED],
    },
    "llama.cpp": {
        "16 bits": [_gguf("f16")],
        "8 bits": [_gguf("q8_0")],
        "gptq": [FOUR, _gguf("q8_0")],
        "fusion": [CUT, _gguf("f16")],
        "fusion, 8 bits": [CUT, _gguf("q8_0")],
        "fusion, gptq": [CUT, FOUR, _gguf("q8_0")],
        "fusion, rora, gptq": [CUT, HEALED, FOUR, _gguf("q8_0")],
    },
}
PEERS = {"W3 g64": "gptq", "llama.cpp": "16 bits"}
UNITS = {
    "perplexity": "1",
    "KL from dense": "nats",
    "size": "1",
    "bytes": "1",
    "processor seconds": "s",
    "prefill": "1/s",
    "decode": "1/s",
}
ROUNDS = 3


def main() -> None:
    """Runs what is missing, or times what was exported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", default="boolq")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS))
    parser.add_argument("--subjects", nargs="*")
    parser.add_argument("--speeds", action="store_true")
    options = parser.parse_args()
    for group in options.groups:
        case = f"{options.model}, {512 * options.sequences} tokens, {Path(options.text).name} {options.windows}x{options.window}, {group}"
        places = {subject: options.out / re.sub("[^a-z0-9]+", "-", f"{group} {subject}".lower()) for subject in GROUPS[group]}
        if options.speeds:
            time_exports(case, group, places)
            continue
        for subject, steps in GROUPS[group].items():
            known = any((row["case"], row["subject"]) == (case, subject) for row in rows.read("compositions"))
            if not known and subject in (options.subjects or places):
                add(case, subject, run(options, steps, places[subject]), PEERS[group])


def run(options: argparse.Namespace, steps: list[dict[str, Any]], out: Path) -> dict[str, dict[str, float]]:
    """What one recipe gives."""
    measured = {
        "method": "evaluate",
        "text": [options.text],
        "windows": options.windows,
        "length": options.window,
        "latency": False,
    }
    recipe = {"calibration": {"sequences": options.sequences, "length": 512}, "steps": [*steps, measured]}
    begun = time.process_time()
    found = duramen.run(recipe, options.model, out)
    spent = time.process_time() - begun
    (told,) = found["evaluations"][-1]["perplexity"].values()
    figures = {"perplexity": told.get("after", told["before"]), "processor seconds": {"value": spent}}
    if "kl" in told:
        figures |= {"KL from dense": told["kl"], "size": {"value": summarise(out, "").size}}
    if found["exports"]:
        figures["bytes"] = {"value": float(found["exports"][-1]["bytes"])}
    return figures


def time_exports(case: str, group: str, places: dict[str, Path]) -> None:
    """Prompt and decode tokens per second of all files there are, by turns."""
    files = {subject: file for subject, place in places.items() for file in place.glob("exports/**/*.gguf")}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for subject, file in files.items():
            vocabulary = AutoConfig.from_pretrained(places[subject]).vocab_size
            found = run_engine("llama_cpp", file, [[1, 2, 3]], vocabulary)
            for metric in ("prefill", "decode"):
                times.setdefault((subject, metric), []).extend(found[metric].tolist())
    for subject in files:
        spread = {metric: np.array(times[subject, metric]) for metric in ("prefill", "decode")}
        figures = {
            metric: {"value": float(np.median(each)), "low": float(each.min()), "high": float(each.max()), "samples": len(each)}
            for metric, each in spread.items()
        }
        add(case, subject, figures, PEERS[group])


def add(case: str, subject: str, figures: dict[str, dict[str, float]], peer: str) -> None:
    """Puts down the rows of a subject, in the place of older ones."""
    table = [
        row
        for row in rows.read("compositions")
        if (row["case"], row["subject"]) != (case, subject) or row["metric"] not in figures
    ]
    for metric, figure in figures.items():
        beside = rows.peer_of(table, case, metric, peer) if subject != peer else None
        more = {name: figure[name] for name in ("low", "high", "samples") if name in figure} | rows.beside(beside)
        table.append(rows.row(case, metric, UNITS[metric], subject, figure["value"], **more))
    rows.write("compositions", table)
    print(
        case.rpartition(", ")[2], subject, {metric: round(figure["value"], 4) for metric, figure in figures.items()}, flush=True
    )


if __name__ == "__main__":
    main()
