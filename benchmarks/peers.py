"""Peers that need an environment of their own: a worker script runs there on the same model and tokens, and says what it found."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def ask(python: str, worker: str, model: Path, tokens: Tensor, *words: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Runs ``worker MODEL TOKENS *words OUT`` by another Python.

    Args:
        python: The Python of the environment.
        worker: Name of a script beside this one. It writes tensors to OUT and prints one line of JSON at last, with ``seconds`` and ``versions``; see ``worker``.
        model: Folder of the model.
        tokens: What it sees, [S, T].
        words: More of its line.

    Returns:
        What it printed, and the tensors.
    """
    with tempfile.TemporaryDirectory() as place:
        given, out = f"{place}/tokens.safetensors", f"{place}/out.safetensors"
        save_file({"tokens": tokens.contiguous()}, given)
        line = [python, str(Path(__file__).with_name(worker)), str(model), given, *words, out]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1]), load_file(out)
