"""Rows of benchmarks/results/*.csv: one measured figure each, with its peer and its machine."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path

import numpy as np

from duramen.intervals import wilson_interval

COLUMNS = [
    "case",
    "metric",
    "unit",
    "subject",
    "value",
    "low",
    "high",
    "samples",
    "peer",
    "peer_value",
    "ratio",
    "versions",
    "machine",
    "date",
]
RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The GPU, or else the processor with its threads and capability, without naming the host."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    return f"{model}; {torch.get_num_threads()} threads; {torch.backends.cpu.get_cpu_capability()}"


def versions(*extra: str) -> str:
    """Versions of the packages that matter."""
    names = ("duramen", "torch", "transformers")
    return " ".join([*(f"{name}={importlib.metadata.version(name)}" for name in names), *extra])


def row(case: str, metric: str, unit: str, subject: str, value: float, **more: object) -> dict[str, object]:
    """One row; ``more`` may hold low, high, samples, peer, peer_value."""
    peer_value = more.get("peer_value")
    ratio = value / float(str(peer_value)) if peer_value else ""
    fixed = {"case": case, "metric": metric, "unit": unit, "subject": subject, "value": value, "ratio": ratio}
    place = {"versions": versions(), "machine": machine(), "date": datetime.date.today().isoformat()}
    return dict.fromkeys(COLUMNS, "") | place | fixed | more


def windows(name: str) -> dict[str, dict[str, list[float]]]:
    """The KL of every window by case and subject, of results/NAME.json; none if there is no such file."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def keep_windows(name: str, case: str, subject: str, kl: list[float]) -> dict[str, list[float]]:
    """Adds the KL of every window of one subject to results/NAME.json, and gives those of all subjects of its case."""
    found = windows(name)
    found.setdefault(case, {})[subject] = kl
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found[case]


def peer_of(table: list[dict[str, object]], case: str, metric: str, subject: str) -> tuple[str, float] | None:
    """The subject that others of a case are held against, and its value; None before it was measured."""
    return next(
        (
            (subject, float(str(row["value"])))
            for row in table
            if (row["case"], row["metric"], row["subject"]) == (case, metric, subject)
        ),
        None,
    )


def beside(peer: tuple[str, float] | None) -> dict[str, object]:
    """The columns of a peer; none before it was measured."""
    return {"peer": peer[0], "peer_value": peer[1]} if peer else {}


def add_accuracy(name: str, table: list[dict[str, object]], case: str, subject: str, correct: np.ndarray, peer: str) -> None:
    """Adds which images were told right, 0 or 1 each, against a subject of the same case, and writes results/NAME.csv."""
    found, against = wilson_interval(correct), peer_of(table, case, "accuracy", peer)
    print(case, subject, round(found.value, 4), flush=True)
    more = {"low": found.low, "high": found.high, "samples": found.samples} | beside(against)
    table.append(row(case, "accuracy", "1", subject, found.value, **more))
    write(name, table)


def read(name: str) -> list[dict[str, object]]:
    """The rows of results/NAME.csv; none if there is no such file."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [dict(item) for item in csv.DictReader(stream)]


def write(name: str, rows: list[dict[str, object]]) -> Path:
    """Writes results/NAME.csv anew."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for item in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in item.items()})
    return path
