"""Claim: the eight commonsense tasks give what lm-eval gives on the same documents, from local files and without a hub.

    python benchmarks/peer_lm_eval.py --peer-python PEER/bin/python --documents 100
    python benchmarks/peer_lm_eval.py --peer-python PEER/bin/python --model out/rora

Writes the embedded requests as local tasks for lm-eval (one jsonl and one YAML file each), runs it on a model in an environment that has it
(``pip install lm-eval``), and scores the same documents by ``evaluate``; both in float32. WinoGrande's choices are contexts with one continuation, which lm-eval
calls multiple inputs. Writes benchmarks/results/peer_lm_eval.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

import rows
from duramen.assets import get_asset, open_model, read_requests
from duramen.evaluate.evaluate import TASK_SETS, open_subject
from duramen.evaluate.evaluate import apply as measure
from duramen.evaluate.likelihood import UNCONDITIONAL

METRICS = {"acc": "accuracy", "acc_norm": "accuracy per character"}


def main() -> None:
    """Scores by both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--peer-python", required=True)
    options = parser.parse_args()
    folder, tasks = open_model(options.model), TASK_SETS["commonsense"]
    with tempfile.TemporaryDirectory() as place:
        for name in tasks:
            write_task(Path(place), name, options.documents)
        theirs, version = run_peer(options.peer_python, folder, Path(place), tasks)
    settings = {"text": (), "prompts": (), "latency": False, "documents": options.documents}
    ours = measure({"before": open_subject(folder)}, tasks=("commonsense",), **settings)["tasks"]
    table = []
    for name, found in ours.items():
        for metric, words in METRICS.items():
            peer = theirs.get(name, {}).get(metric)
            figure = found["before"][metric]
            compared = {"peer": "lm-eval", "peer_value": peer} if peer is not None else {}
            case = f"{Path(options.model).name}, {options.documents} documents a task, {name}"
            shared = {"versions": rows.versions(f"lm_eval={version}"), "samples": figure["samples"]}
            table.append(
                rows.row(
                    case, words, "1", "duramen", figure["value"], low=figure["low"], high=figure["high"], **shared, **compared
                )
            )
            if peer is not None:
                table.append(rows.row(case, words, "1", "lm-eval", peer, **shared))
            print(name, metric, figure["value"], peer, flush=True)
    rows.write("peer_lm_eval", table)


def write_task(place: Path, name: str, documents: int) -> None:
    """One task as lm-eval reads it."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in read_requests(get_asset(name, "task").path()):
        if row["doc_id"] < UNCONDITIONAL and (row["doc_id"] in found or len(found) < documents):
            found.setdefault(row["doc_id"], []).append(row)
    lines = []
    for choices in found.values():
        contexts, ends = ([choice["request"][key] for choice in choices] for key in ("context", "continuation"))
        lines.append({"contexts": contexts, "context": contexts[0], "ends": ends, "end": ends[0], "label": choices[0]["label"]})
    by_context = all(len(set(line["ends"])) == 1 for line in lines)
    (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    forms = (
        {"doc_to_text": "label", "doc_to_choice": "contexts", "doc_to_target": "end"}
        if by_context
        else {"doc_to_text": "{{context}}", "doc_to_choice": "ends", "doc_to_target": "label"}
    )
    task = {
        "task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / f"{name}.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "target_delimiter": "", **forms,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS],
    }  # fmt: skip
    (place / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def run_peer(python: str, folder: Path, place: Path, tasks: tuple[str, ...]) -> tuple[dict[str, dict[str, float]], str]:
    """What lm-eval finds, by task, and its version."""
    line = [
        python, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--include_path", str(place),
        "--tasks", ",".join(f"local_{name}" for name in tasks), "--batch_size", "8", "--output_path", str(place / "out"), "--device", "cpu",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "cache")}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | offline
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env=environment)
    found = json.loads(next((place / "out").rglob("results_*.json")).read_text(encoding="utf-8"))
    scores = {
        name: {metric: found["results"][f"local_{name}"][f"{metric},none"] for metric in METRICS if f"{metric},none" in found["results"][f"local_{name}"]}
        for name in tasks
    }  # fmt: skip
    return scores, str(found.get("lm_eval_version", "?"))


if __name__ == "__main__":
    main()
