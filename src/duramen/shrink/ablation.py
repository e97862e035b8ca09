"""What the loss really does when units are taken away: the measured side of importance, by forward passes only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duramen.calibrate.activations import Activations, Budget
from duramen.calibrate.backward import next_token_loss
from duramen.calibrate.walker import SCRATCH, Walk
from duramen.families.model import BlockModel, Call, run_block
from duramen.shrink.groups import Units
from duramen.shrink.plan import Plan
from duramen.shrink.surgery import masked, zeroed

Trial = tuple[Units, list[int]]
"""Units of one kind and block, and which of them are taken away."""


@torch.no_grad()
def masked_losses(model: BlockModel, plans: Sequence[Plan], sequences: Tensor) -> Float[Tensor, "P N"]:
    """The mean next-token loss of every sequence with what each plan removes set to zero.

    Args:
        model: The model; it stays as it is.
        plans: What to try.
        sequences: Token ids, [N, T].
    """
    found = []
    for plan in plans:
        with masked(model, plan):
            (hidden,) = model.last_hidden([sequences])
        found.append(_losses(model, hidden, sequences))
    return torch.stack(found)


@torch.no_grad()
def loss_rises(model: BlockModel, trials: list[Trial], sequences: Tensor, *, walk: Walk) -> Float[Tensor, "R"]:
    """How much the mean loss rises with each trial alone.

    All trials run side by side from the block that they are about, so that each block is opened once.

    Args:
        model: The model; it stays as it is.
        trials: In the order of their blocks.
        sequences: Token ids, [N, T].
        walk: Where hidden states go that exceed its budget.
    """
    with TemporaryDirectory(dir=walk.scratch, prefix=SCRATCH) as scratch:
        budget = Budget(walk.activation_memory)
        hidden, calls = model.capture(sequences)
        started: list[Activations] = []
        for index in range(len(model.blocks)):
            here = [trial for trial in trials if trial[0].block == index]
            with model.opened(index) as block:
                for states in started:
                    for number in range(len(states)):
                        states[number] = run_block(block.module, states[number], calls[index])
                outcomes = _tried(model, block.module, hidden, calls[index], here)
                started.append(Activations(outcomes, budget, Path(scratch) / str(index)))
                hidden = run_block(block.module, hidden, calls[index])
        before = _losses(model, hidden, sequences).mean()
        after = [_losses(model, states[number], sequences).mean() for states in started for number in range(len(states))]
    return torch.stack(after) - before


def _tried(model: BlockModel, module: nn.Module, hidden: Tensor, call: Call, trials: list[Trial]) -> Iterator[Tensor]:
    """The hidden states after a block under each trial."""
    for units, gone in trials:
        with zeroed(model, units, units.others(gone)):
            yield run_block(module, hidden, call)


def _losses(model: BlockModel, hidden: Tensor, sequences: Tensor) -> Float[Tensor, "N"]:
    """Mean next-token loss of every sequence from the hidden states after the last block."""
    return torch.stack([next_token_loss(model, hidden[[number]], tokens) for number, tokens in enumerate(sequences)]).cpu()


def strata(scores: Float[Tensor, "U"], count: int) -> list[list[int]]:
    """Units by score in so many parts of about equal size, the least important first; random subsets would average the signal away."""
    parts = torch.tensor_split(scores.argsort(stable=True), min(count, len(scores)))
    return [sorted(part.tolist()) for part in parts]


def fit_share(
    coarse: Float[Tensor, "R"], fine: Float[Tensor, "R"], rises: Float[Tensor, "R"], means: tuple[float, float]
) -> float:
    """The share a of the coarse score that explains measured losses best.

    Non-negative least squares ΔL ≈ b_c·Σc + b_f·Σf over the trials; then a = b_c·c̄ / (b_c·c̄ + b_f·f̄).

    Args:
        coarse: Sum of the coarse scores of what each trial took away, [R].
        fine: The same of the fine scores, [R].
        rises: Measured rise of the loss, [R].
        means: c̄ and f̄, the mean scores of a unit.

    Returns:
        a in [0, 1]; one half where neither explains anything.
    """
    design, wanted = torch.stack([coarse, fine], 1).double(), rises.double()
    scale = design.norm(dim=0).clamp_min(1e-30)
    both = torch.linalg.lstsq(design / scale, wanted[:, None], driver="gelsd").solution[:, 0] / scale
    if bool((both < 0).any()):  # the optimum lies on an edge: one score alone
        alone = ((design * wanted[:, None]).sum(0) / scale.square()).clamp_min(0)
        left = [(design[:, k] * alone[k] - wanted).square().sum() for k in (0, 1)]
        both = torch.where(torch.arange(2) == (0 if left[0] < left[1] else 1), alone, 0)
    explained = both * torch.tensor(means, dtype=torch.double)
    return float(explained[0] / explained.sum()) if explained.sum() > 0 else 0.5
