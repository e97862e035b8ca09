"""Attention that Duramen takes part in: transformers lets others fetch it by name, and so keys and values are rounded, and queries and keys seen, in any family.

A module's attention stays the one that it had; what is done before it stands on the module.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

PREFIX = "duramen_"
"""How the names begin under which transformers finds attention that we take part in."""
CHANGE, WATCH = "_duramen_change", "_duramen_watch"
Change = Callable[[Tensor, Any], Tensor]
"""(keys or values [B, n, T, P], the width of a sliding window or None) -> what takes their place."""


class Seen:
    """What an attention module was called with.

    Attributes:
        query: After rotary embedding, [B, H, T, P].
        key: As it is read, [B, G, S, P].
        value: The same.
        mask: As transformers made it: [B, 1, T, S] or with fewer entries to spread, bool where it may look or a float to add; None for the causal one.
        scaling: By which logits are multiplied.
        softcap: Bound of the logits; None without one.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
    ) -> None:
        self.query, self.key, self.value, self.mask, self.softcap = query, key, value, mask, softcap
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def allowed(self, rows: slice) -> Bool[Tensor, "#B 1 t S"]:
        """Where some rows may look."""
        length, keys = self.query.shape[2], self.key.shape[2]
        if self.mask is None:
            whole = torch.ones(length, keys, dtype=torch.bool, device=self.query.device).tril(keys - length)[None, None]
        else:
            whole = self.mask[..., :keys]
            whole = whole if whole.dtype == torch.bool else whole > torch.finfo(whole.dtype).min / 2
        return whole.expand(-1, -1, length, -1)[:, :, rows]

    def logits(self, rows: slice) -> Float[Tensor, "B H t S"]:
        """What the softmax of some rows is taken of, before the mask."""
        keys = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        found = (self.query[:, :, rows] @ keys.transpose(2, 3)) * self.scaling
        return found if self.softcap is None else self.softcap * (found / self.softcap).tanh()


def attention_paths(network: nn.Module) -> list[str]:
    """Paths of the modules that fetch their attention by name, as transformers lets them."""
    return [name for name, module in network.named_modules() if _fetches(module)]


def _fetches(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def change_kept(attention: nn.Module, change: Change) -> None:
    """Makes an attention module put keys and values through ``change`` from here on, instead of through an earlier one."""
    _take_part(attention)
    attention.__dict__[CHANGE] = change


def watch(attention: nn.Module, look: Callable[[Seen], None] | None) -> None:
    """Makes an attention module show what it is called with, after any change; None ends it."""
    _take_part(attention)
    attention.__dict__[WATCH] = look


def _take_part(attention: nn.Module) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = str(attention.config._attn_implementation)  # type: ignore[union-attr]
    if not name.startswith(PREFIX):
        AttentionInterface.register(PREFIX + name, partial(_attend, name))
        AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
        attention.config._attn_implementation = PREFIX + name  # type: ignore[union-attr]


def _attend(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **options: Any,
) -> Any:
    """The attention of this name, on changed keys and values."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, plain)
    change, look = module.__dict__.get(CHANGE), module.__dict__.get(WATCH)
    if change is not None:
        key, value = (change(each, options.get("sliding_window")) for each in (key, value))
    if look is not None:
        look(Seen(query, key, value, attention_mask, options.get("scaling"), options.get("softcap")))
    return attend(module, query, key, value, attention_mask, *args, **options)
