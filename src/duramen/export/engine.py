"""An exported model in its own engine, run in a process of its own, and held against what transformers says."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from duramen.grids import Format, Inputs
from duramen.hardware.clock import prompt
from duramen.problem import Exit, Problem
from duramen.rounding import start_rounding

PROMPTS = (
    "The heartwood of a tree is", "Q: What is the capital of France?\nA:", "Once upon a time", "Water boils at", "The opposite of hot is",
    "def add(a, b):\n    return", "In 1969, people first", "My favourite season is", "1, 2, 3, 4,", "The largest planet is",
    "To bake bread you need", "She opened the door and", "A triangle has", "The sun rises in the", "Dear Sir or Madam,",
    "The main reason for this is", "Photosynthesis is the process by which", "He was born in", "If it rains tomorrow,", "The recipe calls for",
)  # fmt: skip
NEW = 32
"""Tokens by which every prompt is continued."""
SHORT, LONG, DECODE, REPEATS = 8, 256, 24, 5
"""Tokens of the prompts that are timed, tokens that are decoded after the short one, and how often."""


def hold_against(
    program: str, model: Path, folder: Path, *, texts: Sequence[str] = PROMPTS, inputs: Mapping[str, Inputs] | None = None
) -> dict[str, Any]:
    """Lets an engine continue texts, and holds it against transformers in float32; what ``compare`` and ``speeds`` say.

    Args:
        program: One of ``duramen.export.engines``.
        model: The export.
        folder: What it was made of.
        texts: What is continued.
        inputs: How the engine rounds the inputs of layers; the network here does so too.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(each)["input_ids"] for each in texts]
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start_rounding(network, {name: Format(inputs=each) for name, each in (inputs or {}).items()})
    ran = run_engine(program, model, prompts, network.config.vocab_size)
    return compare(network, prompts, ran) | speeds(ran)


def run_engine(program: str, model: Path, prompts: Sequence[Sequence[int]], vocabulary: int) -> dict[str, Any]:
    """Lets an engine continue prompts greedily, and times it; a crash is its own.

    Args:
        program: One of ``duramen.export.engines``.
        model: File or folder.
        prompts: Token ids.
        vocabulary: How many tokens there are, for the prompts that are timed.

    Returns:
        ``tokens`` [prompts, NEW]; ``logits`` [prompts, V] of the first of them, where the engine shows them; tokens per second of ``prefill`` (256 tokens) and of ``decode`` (24 after 8), every repeat;
        ``memory``: the most bytes that the process held.

    Raises:
        NotRun: If the engine crashed or said why not.
    """
    timed = prompt(vocabulary)[0].tolist()
    question = {
        "prompts": [list(ids) for ids in prompts], "new": NEW, "long": timed[:LONG], "short": timed[:SHORT], "decode": DECODE, "repeats": REPEATS,
    }  # fmt: skip
    with TemporaryDirectory() as place:
        asked, answer = Path(place) / "question.json", Path(place) / "answer.npz"
        asked.write_text(json.dumps(question), encoding="utf-8")
        run_program(
            [str(Path(__file__).parent / "engines" / f"{program}.py"), str(model), str(asked), str(answer)],
            f"{program} did not run {model}",
        )
        with np.load(answer) as found:
            return {name: found[name] for name in found.files}


class NotRun(Problem):
    """An engine ended otherwise than well."""


def run_or_said(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an engine found, or ``failed`` with why there is nothing: its crash is no fault of the file."""
    try:
        return run()
    except NotRun as problem:
        return {"failed": problem.why}


def run_program(arguments: list[str], what: str) -> None:
    """Runs a Python program by this interpreter, its output aside.

    Raises:
        NotRun: If it ends otherwise than well, with the last that it said, or the signal that ended it.
    """
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = [line for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
        said = lines[errors[-1] :][:3] if errors else lines[-1:]
        crashed = ended.returncode < 0
        raise NotRun(
            f"{what}.",
            why=f"it was ended by {signal.Signals(-ended.returncode).name}."
            if crashed
            else f"it says: {' '.join(said) or 'nothing'}",
            fix="another version of the engine.",
            code=Exit.CHECK_FAILED,
        )


@torch.no_grad()
def compare(network: nn.Module, prompts: Sequence[Sequence[int]], found: dict[str, Any]) -> dict[str, Any]:
    """Holds an engine's continuations against a network's, greedy both.

    Args:
        network: What the export should be.
        prompts: Token ids.
        found: Of ``run_engine``.

    Returns:
        ``prompts``; ``agreed``: how many were continued alike to the end, the tokens that end a text left out by both; ``apart``: for every other one the step at which they part, and the ``gap`` there: how much likelier
        than the engine's token the network holds its own, in logits; ``largest_difference`` of a logit of the first tokens, None where the engine shows none, and the
        ``largest_logit``.
    """
    differences, largest, apart = [], [], {}
    for number, ids in enumerate(prompts):
        tokens = torch.tensor([list(ids)])
        logits = _logits(network, tokens)
        if "logits" in found:
            differences.append(float((logits - torch.from_numpy(found["logits"][number])).abs().max()))
        largest.append(float(logits.abs().max()))
        theirs = found["tokens"][number].tolist()
        ours = network.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=len(theirs), min_new_tokens=len(theirs), do_sample=False, pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
        step = next((place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        if step is not None:
            logits = _logits(network, torch.tensor([[*ids, *ours[:step]]]))
            apart[number] = {"step": step, "gap": float(logits[ours[step]] - logits[theirs[step]])}
    return {
        "prompts": len(prompts), "agreed": len(prompts) - len(apart), "apart": list(apart.values()),
        "largest_difference": max(differences, default=None), "largest_logit": max(largest),
    }  # fmt: skip


def _logits(network: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = network(tokens, use_cache=False).logits
    return logits[0, -1].float()


def speeds(found: dict[str, Any]) -> dict[str, Any]:
    """What was timed, as the report shows it."""
    spread = {
        name: {"median": float(np.median(found[key])), "low": float(found[key].min()), "high": float(found[key].max())}
        for name, key in (("prefill_tokens_per_second", "prefill"), ("decode_tokens_per_second", "decode"))
    }
    return spread | {"peak_memory_bytes": int(found["memory"])}
