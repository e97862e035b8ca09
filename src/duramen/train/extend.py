"""Context extension: positions turn more slowly (a larger base of the rotary embedding), and training goes on in longer rows.

That it helped is shown and not supposed: the held-out loss by place in the row, before and after.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from duramen.hardware.machine import fastest_device
from duramen.problem import Problem
from duramen.registry import method
from duramen.train import pretrain
from duramen.train.data import Rows, keeps_apart
from duramen.train.folder import open_causal
from duramen.train.stage import MODEL, TOKENS, Stage
from duramen.train.text import read_corpus

STRETCHES = 8
"""Parts of a row whose loss is told apart."""


class Settings(pretrain.Settings):
    """Settings of extension."""

    context: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a row."""
    steps: Annotated[int, Field(ge=1)] = 100
    """How many."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Of AdamW at its height."""
    rope_theta: Annotated[float, Field(ge=0)] = 0.0
    """The new base of the rotary embedding; 0 keeps the old one. Layers that look through a sliding window keep theirs."""


@method("extend", title="Context extension", paper="arXiv 2309.16039, 2412.06845", kind="train", settings=Settings)
def apply(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Goes on with a model in longer rows and writes ``model``; see ``pretrain``.

    Args:
        stage: Has the tokens and the model.
        settings: See ``Settings``.

    Returns:
        What ``pretrain`` returns, and the held-out loss by place before and after.

    Raises:
        Problem: If no document is long enough to show anything, or the model has no rotary embedding to turn more slowly.
    """
    folder, tokenizer = stage.need(MODEL, "extend"), pretrain.open_tokenizer(stage)
    network = open_causal(folder)
    shared = keeps_apart(network, len(tokenizer))
    aside = read_corpus(stage.need(TOKENS, "extend"), "held_out", settings.context, tokenizer.pad_token_id or 0, shared=shared)
    rows = long_rows(pretrain.first_rows(aside, 10**9), settings)
    before = loss_by_place(network, rows)
    found = pretrain.learn(stage, settings, turned(network, settings), None)
    return found | {"by_place": {"before": before, "after": loss_by_place(open_causal(stage.folder / MODEL), rows)}}


def turned(network: Any, settings: Settings) -> Any:
    """A model with the new base and room for the longer rows."""
    from transformers import AutoModelForCausalLM

    config = network.config
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = max(config.max_position_embeddings, settings.context)
    if settings.rope_theta:
        if not getattr(config, "rope_parameters", None):
            raise Problem(
                f"A {config.model_type} has no rotary embedding.",
                why="`rope_theta` is its base.",
                fix="`rope_theta: 0`, which keeps all as it is.",
            )
        config.rope_parameters = slower(config.rope_parameters, settings.rope_theta)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(network.state_dict())
    return fresh


def slower(rope: dict[str, Any], base: float) -> dict[str, Any]:
    """Rotary parameters with another base; where kinds of attention have their own, those that see the whole row have it."""
    if "rope_theta" in rope:
        return rope | {"rope_theta": base}
    return {kind: own | {"rope_theta": base} if kind == "full_attention" else own for kind, own in rope.items()}


def long_rows(rows: Rows, settings: Settings) -> Rows:
    """Rows that one document fills.

    Raises:
        Problem: If there are none.
    """
    assert rows.places is not None
    filled = rows.learned.sum(1) == rows.tokens.shape[1] - 1
    if not filled.any():
        raise Problem(
            f"No held-out document has {settings.context} tokens.", why="only such a one shows whether a longer context is used.",
            fix="longer documents, or a smaller `context`.",
        )  # fmt: skip
    return rows[filled.nonzero().flatten()[: settings.held_out_rows]]


@torch.no_grad()
def loss_by_place(network: Any, rows: Rows) -> list[float]:
    """Mean negative log-likelihood of the tokens in each eighth of the rows, in nats."""
    device = fastest_device()
    network.to(device).eval()
    total = torch.zeros(rows.tokens.shape[1] - 1, dtype=torch.float64)
    for row in rows.tokens.to(device):
        logs = network(input_ids=row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total -= logs.gather(-1, row[1:, None])[:, 0].double().cpu()
    network.to("cpu")
    return [float(part.mean()) / len(rows) for part in total.chunk(STRETCHES)]
