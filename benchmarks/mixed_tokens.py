"""Claim: six bits for all tokens are four to seven times as near to the dense model as the best mixture of eight and four that was measured; tokens that attend to the first are a better half than random ones, those with large channels a better one still.

    python benchmarks/mixed_tokens.py --text wiki.test.raw

Rounds nothing but the inputs of linear layers, of SmolLM2-135M rotated: half of the tokens of every window to eight bits and the others to four, chosen by how much they attend to the first token, as
"EdgeQAT" (arXiv 2402.10787) does, by the opposite, at random, by their largest channel, or by position; or all to six bits, or to five. Attention of a block decides for its output projection,
its MLP and the next block's queries, keys and values; the first block's have eight bits. Measures perplexity and KL from the dense model. Adds to benchmarks/results/mixed_tokens.csv after every run. About 15 minutes
on 2 cores.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import rows
from duramen.attention import Seen, attention_paths, watch
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity
from duramen.families.model import BlockModel
from duramen.grids import Inputs
from duramen.hardware.machine import fastest_device
from duramen.intervals import mean_interval
from duramen.registry import get_method
from duramen.rounding import round_inputs
from pruning_quality import Bench, arguments

SUBJECTS = (
    "by attention to the first",
    "by its opposite",
    "at random",
    "by the largest channel",
    "the first half",
    "six bits",
    "five bits",
)
HIGH, LOW = 8, 4
CHUNK = 128


class Mixture:
    """Rounds the inputs of a network's layers, every token to one of two widths."""

    def __init__(self, network: nn.Module, layers: list[str], subject: str, group: int | None) -> None:
        self.subject, self.group = subject, group
        self.high: Tensor | None = None
        self.generator = torch.Generator().manual_seed(0)
        network.get_submodule(layers[0]).register_forward_pre_hook(self._begin)
        for path in layers:
            network.get_submodule(path).register_forward_pre_hook(self._round)
        if subject.startswith("by") and "channel" not in subject:
            for path in attention_paths(network):
                watch(network.get_submodule(path), self._look)

    def _begin(self, *_: Any) -> None:
        """The first layer of a pass: nothing has attended yet."""
        self.high = None

    def _look(self, seen: Seen) -> None:
        """Half of the tokens, by the mean over heads of what they give the first one."""
        shares = []
        for start in range(0, seen.query.shape[2], CHUNK):
            rows_ = slice(start, start + CHUNK)
            maps = seen.logits(rows_).masked_fill(~seen.allowed(rows_), -torch.inf).softmax(-1)
            shares.append(maps[..., 0].mean(1))
        self.high = self._half(torch.cat(shares, 1) * (-1 if "opposite" in self.subject else 1))

    @staticmethod
    def _half(score: Tensor) -> Tensor:
        """The larger half of every row [B, T], the first token always."""
        score = score.clone()
        score[:, 0] = torch.inf
        chosen = torch.zeros_like(score, dtype=torch.bool)
        return chosen.scatter(1, score.topk(score.shape[1] // 2).indices, True)

    def _round(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        bits = {"six bits": 6, "five bits": 5}.get(self.subject)
        if bits:
            return (round_inputs(x, Inputs(bits, self.group)), *args[1:])
        if self.subject == "at random":
            high = self._half(torch.rand(x.shape[:2], generator=self.generator).to(x.device))
        elif self.subject == "by the largest channel":
            high = self._half(x.abs().amax(-1))
        elif self.subject == "the first half":
            high = (torch.arange(x.shape[1], device=x.device) < x.shape[1] // 2)[None]
        else:
            high = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if self.high is None else self.high
        both = (round_inputs(x, Inputs(width, self.group)) for width in (HIGH, LOW))
        return (torch.where(high[..., None], *both), *args[1:])


def main() -> None:
    """Runs the table."""
    parser = arguments(("row", "g32"), SUBJECTS)
    options = parser.parse_args()
    table, bench = rows.read("mixed_tokens"), Bench.open(options)
    rotated = AutoModelForCausalLM.from_pretrained(bench.folder, dtype="float32").to(fastest_device())
    get_method("rotate").apply(rotated, bench.tokens)
    for share in options.targets:
        case = f"{options.model}, {Path(options.text).name} {options.windows}x{options.window}, steps by {share}"
        for subject in options.subjects:
            if any((row["case"], row["subject"]) == (case, subject) for row in table):
                continue
            model = BlockModel.from_module(copy.deepcopy(rotated))
            Mixture(model.network, list(model.layer_names()), subject, 32 if share == "g32" else None)
            hidden = [each for window in bench.windows for each in final_hidden(model, window[None])]
            found = divergence(bench.dense, bench.hidden, model, hidden, bench.windows)
            figures = {"perplexity": perplexity(found.loss), "KL from dense": mean_interval(found.kl)}
            print(share, subject, {name: round(figure.value, 4) for name, figure in figures.items()}, flush=True)
            for metric, figure in figures.items():
                table.append(bench.row(case, metric, subject, figure, rows.peer_of(table, case, metric, SUBJECTS[0])))
            rows.write("mixed_tokens", table)


if __name__ == "__main__":
    main()
