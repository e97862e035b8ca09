"""Group norm of a feature that is never whole: statistics slice by slice, merged exactly, and then a scale and a shift for every channel.

The published code normalises each slice by itself, and its result depends on how many slices there are ("Fast and Memory-Efficient Video Diffusion Using Streamlined Inference", Zhan et al., NeurIPS 2024, arXiv 2411.01171, calls it lossless).
Two parts merge by Chan's formula, without the difference of two large squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Of some numbers per batch and group.

    Attributes:
        count: How many.
        mean: [B, G].
        apart: Sum of the squared distances from the mean, [B, G].
    """

    count: int
    mean: Float[Tensor, "B G"]
    apart: Float[Tensor, "B G"]

    def merged(self, other: Moments) -> Moments:
        """Of both (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        between = other.mean - self.mean
        mean = self.mean + between * (other.count / count)
        apart = self.apart + other.apart + between.square() * (self.count * other.count / count)
        return Moments(count, mean, apart)


def moments(x: Float[Tensor, "B T C H W"], groups: int) -> Moments:
    """Of every group of channels over frames and places; in float32 at least, so that half precision cannot overflow.

    Args:
        x: A slice of a feature, one that may be converted.
        groups: G.
    """
    batch, frames, channels, height, width = x.shape
    split = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(batch, frames, groups, channels // groups, height, width)
    variance, mean = torch.var_mean(split, (1, 3, 4, 5), correction=0)
    count = split.numel() // (batch * groups)
    return Moments(count, mean, variance * count)


def affine(found: Moments, norm: nn.GroupNorm) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """What normalising is for every channel: a scale and a shift.

    Args:
        found: Of the whole feature.
        norm: Its weights and ε.
    """
    each = norm.num_channels // norm.num_groups
    inverse = (found.apart / found.count + norm.eps).rsqrt().repeat_interleave(each, 1)
    mean = found.mean.repeat_interleave(each, 1)
    weight, bias = (torch.ones_like(mean), torch.zeros_like(mean)) if norm.weight is None else (norm.weight, norm.bias)
    scale = inverse * weight
    return scale, bias - mean * scale


def normalised(
    x: Float[Tensor, "B T C H W"], scale: Float[Tensor, "B C"], shift: Float[Tensor, "B C"]
) -> Float[Tensor, "B T C H W"]:
    """A slice, scaled and shifted; of its own type."""
    found = torch.addcmul(shift[:, None, :, None, None], x, scale[:, None, :, None, None])
    return found.to(x.dtype)
