"""2:4 weights in PyTorch's own packed form, for GPUs that multiply it; packing is checked, because PyTorch does not.

A matrix that is not 2:4 is packed without an error and comes back with weights missing. So every weight is unpacked again and
compared. Which runtime runs which pattern: docs, "sparse formats".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from duramen.families.inventory import find_pattern
from duramen.problem import Exit, Problem

PACKED = (torch.float16, torch.bfloat16)
"""Types that PyTorch packs exactly; its float32 packing does not come back whole."""
SHAPE = (32, 64)
"""Rows and columns must be multiples of these (CUTLASS, 16 bit)."""
CAPABILITY = (8, 0)
"""Least compute capability with sparse tensor cores."""


def why_not(weight: Tensor) -> str | None:
    """Why a weight [O, I] cannot be packed as 2:4, or None if it can."""
    if weight.dtype not in PACKED:
        return f"it is {str(weight.dtype).removeprefix('torch.')}; packed are float16 and bfloat16"
    if weight.shape[0] % SHAPE[0] or weight.shape[1] % SHAPE[1]:
        return f"its shape {tuple(weight.shape)} is no multiple of {SHAPE}"
    if find_pattern(weight) not in ("2:4", "1:4"):
        return "a group of four has more than two weights"
    return None


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packs a 2:4 weight [O, I] as PyTorch's CUTLASS kernels want it, and proves that nothing was lost.

    Returns:
        The kept weights, [O, I/2], and their places, int16 [O, I/16].

    Raises:
        Problem: If it is not 2:4, or of a type or shape that PyTorch does not pack.
    """
    reason = why_not(weight)
    if reason is not None:
        raise Problem(
            "The weight cannot be packed as 2:4.",
            why=f"{reason}.",
            fix='prune with `pattern: "2:4"` and load in bfloat16; `duramen inspect --layers` shows every layer.',
            code=Exit.INCOMPATIBLE,
        )
    values, places = sparse_semi_structured_from_dense_cutlass(weight.contiguous())  # type: ignore[no-untyped-call]
    back = sparse_semi_structured_to_dense_cutlass(values, places)  # type: ignore[no-untyped-call]
    assert torch.equal(back, weight), "packing lost weights of a 2:4 matrix"
    return values, places


def pack_linears(network: nn.Module) -> list[str]:
    """Replaces every 2:4 linear weight of a loaded model by its packed form, in place.

    Returns:
        Names of the layers that are packed; the others stay dense.

    Raises:
        Problem: If the model is not on a GPU with sparse tensor cores, where alone the packed form multiplies.
    """
    device = next(network.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise Problem(
            f"2:4 weights cannot be multiplied on {device}.",
            why=f"only GPUs of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} and above have sparse tensor cores.",
            fix="keep the ordinary folder: it runs dense everywhere, with the same results.",
            code=Exit.INCOMPATIBLE,
        )
    packed = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and why_not(module.weight) is None:
            pack(module.weight.detach())
            module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
            packed.append(name)
    return packed
