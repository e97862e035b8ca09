"""The short causal convolution before a scan, over tokens some of whose neighbours may be gone, with the inputs that the next call needs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def causal_conv(
    inputs: Float[Tensor, "B K E"],
    weight: Float[Tensor, "E k"],
    bias: Float[Tensor, "E"] | None = None,
    *,
    initial: Float[Tensor, "B m E"] | None = None,
    valid: Bool[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, "B K E"], Float[Tensor, "B m E"]]:
    """Convolves the tokens as they are packed: y_s = Σ_i w_{k−1−i}·x_{s−i}.

    Args:
        inputs: x.
        weight: One filter per channel.
        bias: One per channel.
        initial: The last k − 1 inputs before these; None for zeros.
        valid: Tokens that count, side by side in each row; the others are zeros, and are not handed on.

    Returns:
        y, and the last k − 1 inputs that count, of these and ``initial``.
    """
    size = weight.shape[1]
    x = inputs if valid is None else inputs * valid[..., None]
    whole = torch.cat([x.new_zeros(len(x), size - 1, x.shape[2]) if initial is None else initial.to(x), x], 1)
    y = torch.nn.functional.conv1d(whole.transpose(1, 2), weight[:, None], bias, groups=len(weight)).transpose(1, 2)
    ends = torch.full((len(x),), x.shape[1], device=x.device) if valid is None else _ends(valid)
    rows = ends[:, None] + torch.arange(size - 1, device=x.device)
    return y, whole.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


def aligned_conv(
    inputs: Float[Tensor, "B K E"],
    weight: Float[Tensor, "E k"],
    bias: Float[Tensor, "E"] | None,
    positions: Int[Tensor, "B K"],
) -> Float[Tensor, "B K E"]:
    """Convolves the tokens at their places, with zeros where others were removed; no sequence of the full length is made.

    Args:
        inputs: x of the tokens that are left.
        weight: One filter per channel.
        bias: One per channel.
        positions: Their places, rising along each row; of what is padding, places that are at least k away from all others.
    """
    size = weight.shape[1]
    y = torch.zeros_like(inputs)
    for back in range(min(size, inputs.shape[1])):
        lag = positions[:, back:] - positions[:, : positions.shape[1] - back]
        near = (lag >= 0) & (lag < size)
        taps = weight.T[(size - 1 - lag).clamp(0, size - 1)] * near[..., None]
        y[:, back:] += taps * inputs[:, : inputs.shape[1] - back]
    return y if bias is None else y + bias


def _ends(valid: Bool[Tensor, "B K"]) -> Int[Tensor, "B"]:
    """One behind the last token that counts, 0 where none does."""
    places = torch.arange(1, valid.shape[1] + 1, device=valid.device)
    return (valid * places).amax(1) if valid.shape[1] else valid.new_zeros(len(valid), dtype=torch.long)
