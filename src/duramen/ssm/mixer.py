"""The mixers of transformers' state-space layers, stage by stage, on our scans: project, convolve, Δ B C, scan, gate, project.

Two functions serve all families, since their mixers are built of parts with the same names: Mamba's kind (mamba, falcon_mamba, jamba) and Mamba-2's
(mamba2, bamba, zamba2, nemotron_h). Against the stock ones they are right where those are not: a prompt may come in several pieces, which the stock
mixers of Mamba's kind begin anew each time, and padding on the right leaves no trace in the states that generation goes on from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from duramen.override import override
from duramen.ssm.conv import aligned_conv, causal_conv
from duramen.ssm.fold import GapStep, fold, gaps, removed_steps
from duramen.ssm.selective import selective_scan
from duramen.ssm.ssd import ssd_scan

PARTS = {"A_log", "D", "conv1d", "in_proj", "out_proj"}
OF_MAMBA, OF_MAMBA2 = {"x_proj", "dt_proj"}, {"dt_bias", "norm"}


class Seen(NamedTuple):
    """What a scan made of its tokens: y, Δ, x after the convolution, and B."""

    outputs: Tensor
    write_steps: Tensor
    inputs: Tensor
    b: Tensor


@dataclass
class Passage:
    """What a mixer is told of the tokens that reach it, and what it tells of them.

    Attributes:
        valid: Which count, bool [B, K]; None for what the mask of the call says.
        places: Where they are in the sequence that they are left of, rising, [B, K]; None where nothing was removed before.
        gap_step: What a removed step would have decayed by; see ``fold``.
        aligned: Whether the convolution sees zeros where tokens were removed, instead of their neighbours.
        watch: Whether to keep what the scan made of them.
        seen: That, from the last call.
    """

    valid: Tensor | None = None
    places: Tensor | None = None
    gap_step: GapStep = "hold"
    aligned: bool = False
    watch: bool = False
    seen: Seen | None = field(default=None, repr=False)

    def decays(self, steps: Tensor, bias: Tensor | None) -> Tensor:
        """Δ̃ from Δ, [B, K, ...]."""
        if self.places is None or self.gap_step == "hold":
            return steps
        gap, _ = gaps(self.places, int(self.places.max()) + 1)
        if self.valid is not None:
            gap = gap * self.valid
        return fold(steps, gap, removed_steps(self.gap_step, steps, bias, self.valid))


class ExactScans:
    """A transformers model whose state-space layers run on our scans, until ``remove`` or the end of a ``with``.

    Args:
        network: The model.
        passages: What mixers are told of their tokens, by their names; those that are left out see all that there are.

    Attributes:
        mixers: The names of its mixers; empty if it has none of the known kinds.
    """

    def __init__(self, network: nn.Module, passages: Mapping[str, Passage] | None = None) -> None:
        found = find_mixers(network)
        self.mixers, self._undo = list(found), []
        for name, mix in found.items():
            mixer = network.get_submodule(name)
            self._undo.append(override(mixer, partial(mix, mixer, passage=(passages or {}).get(name))))

    def remove(self) -> None:
        """Gives the mixers their own way back."""
        while self._undo:
            self._undo.pop()()
        self.mixers = []

    def __enter__(self) -> ExactScans:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def find_mixers(network: nn.Module) -> dict[str, Callable[..., Tensor]]:
    """The state-space mixers of a model by name, and how each is run."""
    found: dict[str, Callable[..., Tensor]] = {}
    for name, module in network.named_modules():
        parts = module._parameters.keys() | module._modules.keys()
        if parts >= PARTS | OF_MAMBA:
            found[name] = selective_mixer
        elif parts >= PARTS | OF_MAMBA2 and not hasattr(module, "mup_vector"):
            found[name] = ssd_mixer
    return found


def selective_mixer(
    mixer: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    passage: Passage | None = None,
    **_: Any,
) -> Tensor:
    """A mixer of Mamba's kind, [B, T, D] -> [B, T, D]; the cache keeps the last inputs of the convolution and the state."""
    kind, passage = hidden_states.dtype, passage or Passage()
    valid = _valid(hidden_states, attention_mask, passage)
    x, gate = mixer.in_proj(_masked(hidden_states, valid)).chunk(2, -1)
    x = _convolved(mixer, x, cache, valid, passage)
    low, b, c = torch.split(mixer.x_proj(x), [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], -1)
    if hasattr(mixer, "dt_layernorm"):
        low, b, c = mixer.dt_layernorm(low), mixer.b_layernorm(b), mixer.c_layernorm(c)
    bias = 0 if mixer.dt_proj.bias is None else mixer.dt_proj.bias.float()
    steps = nn.functional.softplus((low @ mixer.dt_proj.weight.T).float() + bias)
    y = _scanned(selective_scan, mixer, x, steps, mixer.dt_proj.bias, b, c, cache, valid, passage)
    return mixer.out_proj((y * nn.functional.silu(gate)).to(kind))  # type: ignore[no-any-return]


def ssd_mixer(
    mixer: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    passage: Passage | None = None,
    **_: Any,
) -> Tensor:
    """A mixer of Mamba-2's kind, [B, T, D] -> [B, T, D]; the cache keeps the last inputs of the convolution and the state."""
    kind, passage = hidden_states.dtype, passage or Passage()
    valid = _valid(hidden_states, attention_mask, passage)
    gate, mixed, dt = mixer.in_proj(_masked(hidden_states, valid)).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1
    )
    mixed = _convolved(mixer, mixed, cache, valid, passage)
    vectors = mixer.n_groups * mixer.ssm_state_size
    x, b, c = torch.split(mixed, [mixer.intermediate_size, vectors, vectors], -1)
    steps = nn.functional.softplus(dt.float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
    b, c = (each.view(*each.shape[:2], mixer.n_groups, mixer.ssm_state_size) for each in (b, c))
    x = x.view(*x.shape[:2], mixer.num_heads, mixer.head_dim)
    y = _scanned(ssd_scan, mixer, x, steps, mixer.dt_bias, b, c, cache, valid, passage)
    return mixer.out_proj(mixer.norm(y.flatten(2), gate).to(kind))  # type: ignore[no-any-return]


def _valid(hidden: Tensor, mask: Tensor | None, passage: Passage) -> Tensor | None:
    """Which tokens count, bool [B, T]; None for all. A mask that goes further back belongs to tokens that came before."""
    if passage.valid is not None:
        return passage.valid
    if mask is None or mask.ndim != 2 or mask.shape[1] < hidden.shape[1]:
        return None
    return mask[:, mask.shape[1] - hidden.shape[1] :].bool()


def _masked(hidden: Tensor, valid: Tensor | None) -> Tensor:
    return hidden if valid is None else hidden * valid[..., None].to(hidden.dtype)


def _convolved(mixer: Any, x: Tensor, cache: Any, valid: Tensor | None, passage: Passage) -> Tensor:
    """The convolution and its activation; the cache holds k inputs, of which the first matters no more."""
    weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    before = None if cache is None else cache.get_conv_state(mixer.layer_idx)
    initial = None if before is None else before[..., 1 - weight.shape[1] :].transpose(1, 2)
    y, last = causal_conv(x.to(weight.dtype), weight, bias, initial=initial, valid=valid)
    if passage.aligned and passage.places is not None:
        y = aligned_conv(_masked(x.to(weight.dtype), valid), weight, bias, passage.places)
    if cache is not None:
        whole = nn.functional.pad(last.transpose(1, 2), (1, 0))
        cache.update_conv_state(whole.to(x.dtype), mixer.layer_idx, conv_kernel_size=weight.shape[1])
    return mixer.act(y).to(x.dtype)  # type: ignore[no-any-return]


def _scanned(
    scan: Callable[..., tuple[Tensor, Tensor]],
    mixer: Any,
    x: Tensor,
    steps: Tensor,
    bias: Tensor | None,
    b: Tensor,
    c: Tensor,
    cache: Any,
    valid: Tensor | None,
    passage: Passage,
) -> Tensor:
    """Y of the scan, which begins with the state that the cache has, and leaves it the new one."""
    before = None if cache is None else cache.get_recurrent_state(mixer.layer_idx)
    y, state = scan(
        x, passage.decays(steps, bias), steps, -mixer.A_log.float().exp(), b, c,
        skip=mixer.D.float(), initial_state=before, valid=valid,
    )  # fmt: skip
    if cache is not None:
        cache.update_recurrent_state(state, mixer.layer_idx)
    passage.seen = Seen(y, steps, x, b) if passage.watch else None
    return y
