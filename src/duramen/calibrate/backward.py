"""The gradients of every block, one block at a time, from the last to the first.

The hidden states before each block are kept from one forward pass (on disk, where they exceed the budget); then every block is
opened once more, run again on each sequence and differentiated. Each tensor's gradient is handed on as soon as it is there, and freed:
in memory are one block, one tensor's gradient, and the activations of one block on one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from torch import Tensor, nn

from duramen.calibrate import ranks
from duramen.calibrate.activations import Activations, Budget, check_activations, check_numbers
from duramen.calibrate.walker import SCRATCH, Walk
from duramen.families.model import BlockModel, Call, run_block
from duramen.problem import Problem


class Observer(Protocol):
    """What looks at the gradients."""

    def paths(self, block: int) -> Sequence[str]:
        """The tensors of a block to look at, by their paths inside it."""

    def see(self, block: int, path: str, weight: Tensor, gradient: Tensor, sequence: int) -> None:
        """One tensor with the gradient of the mean next-token loss of one sequence, both as stored."""

    def finish(self, block: int) -> None:
        """All sequences of this block, on this rank, were seen."""


def walk_back(model: BlockModel, tokens: Tensor, observer: Observer, *, walk: Walk) -> list[float]:
    """Shows an observer the gradients of all blocks, sequence by sequence.

    Args:
        model: The model; it stays as it is.
        tokens: Token ids, [S, T], at least two tokens a sequence.
        observer: Looks at the gradients.
        walk: Where activations go that exceed its budget.

    Returns:
        The mean next-token loss of every sequence of this rank.

    Raises:
        Problem: If sequences are too short, or activations or gradients are not finite.
    """
    if tokens.shape[1] < 2:
        raise Problem(
            f"Sequences of {tokens.shape[1]} token have no next token.",
            why="gradients are those of the next-token loss.",
            fix="`calibration: {length: 512}`.",
        )
    mine = list(range(ranks.rank(), len(tokens), ranks.count()))
    with TemporaryDirectory(dir=walk.scratch, prefix=SCRATCH) as scratch:
        budget = Budget(walk.activation_memory)
        before, calls = _forward(model, [tokens[number : number + 1] for number in mine], budget, Path(scratch))
        gradients, losses = _top(model, before.pop(), tokens[mine], budget, Path(scratch) / "gradients")
        for index in reversed(range(len(model.blocks))):
            _back(model, index, before.pop(), gradients, [call[index] for call in calls], mine, observer)
            observer.finish(index)
    return losses


@torch.no_grad()
def _forward(
    model: BlockModel, sequences: list[Tensor], budget: Budget, scratch: Path
) -> tuple[list[Activations], list[list[Call]]]:
    """Hidden states before every block and after the last, and what the blocks were called with."""
    captured = [model.capture(sequence) for sequence in sequences]
    calls = [called for _, called in captured]
    before = [Activations((hidden.clone() for hidden, _ in captured), budget, scratch / "0")]
    del captured
    for index in range(len(model.blocks)):
        with model.opened(index) as block:
            after = (run_block(block.module, before[-1][number], calls[number][index]) for number in range(len(calls)))
            before.append(Activations(after, budget, scratch / str(index + 1)))
            for number in range(len(calls)):
                check_activations(before[-1][number], f"{model.family.blocks}.{index}")
    return before, calls


def _top(model: BlockModel, last: Activations, tokens: Tensor, budget: Budget, folder: Path) -> tuple[Activations, list[float]]:
    """The gradient of the loss with respect to the hidden states after the last block, per sequence, and the losses."""
    losses: list[float] = []

    def gradients() -> Iterator[Tensor]:
        for number in range(len(last)):
            hidden = last[number].detach().requires_grad_()
            loss = next_token_loss(model, hidden, tokens[number])
            losses.append(float(loss.detach()))
            yield torch.autograd.grad(loss, hidden)[0]

    with torch.enable_grad():
        return Activations(gradients(), budget, folder), losses


def next_token_loss(model: BlockModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Mean loss of one sequence from its hidden states after the last block, [1, T, D], and its token ids, [T]."""
    return nn.functional.cross_entropy(model.logits(hidden)[0, :-1].float(), tokens[1:].to(hidden.device))


def _back(
    model: BlockModel,
    index: int,
    before: Activations,
    gradients: Activations,
    calls: list[Call],
    numbers: list[int],
    observer: Observer,
) -> None:
    """Differentiates one block on every sequence; ``gradients`` moves from behind it to before it."""
    with model.opened(index) as block, _watched(block.module, observer.paths(index)) as watched, torch.enable_grad():
        name = f"{model.family.blocks}.{index}"
        for place, number in enumerate(numbers):
            handles = [
                parameter.register_post_accumulate_grad_hook(_show(observer, index, path, number, name))  # type: ignore[no-untyped-call]
                for path, parameter in watched.items()
            ]
            hidden = before[place].detach().requires_grad_()
            run_block(block.module, hidden, calls[place]).backward(gradients[place])  # type: ignore[no-untyped-call]
            for handle in handles:
                handle.remove()
            assert hidden.grad is not None
            gradients[place] = hidden.grad


@contextmanager
def _watched(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Lets gradients flow to these parameters alone."""
    wanted = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.requires_grad_(False)
    try:
        yield {path: module.get_parameter(path).requires_grad_() for path in paths}  # type: ignore[misc]
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(wanted[name])


def _show(observer: Observer, block: int, path: str, sequence: int, name: str) -> Callable[[Tensor], None]:
    def hand_on(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        check_numbers(
            gradient,
            f"The gradient of {name}.{path} is not finite in sequence {sequence}.",
            why="the loss overflows in this type, or the model is damaged.",
        )
        observer.see(block, path, parameter.detach(), gradient, sequence)

    return hand_on
