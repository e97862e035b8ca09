"""Patches that leave a vision transformer of transformers, ViT, DeiT or DINOv2: with no recurrence there is nothing to align, and everything else is as for state-space models.

Importance is what the class token takes from a patch, Σ over heads of A·‖v‖ (``write``), or the attention alone, as in EViT (arXiv 2202.07800). Merging compares keys, as ToMe does
(arXiv 2210.09461), and later layers count a token as often as it stands for one, by log(size) on the logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from duramen.attention import Seen, attention_paths, watch
from duramen.override import override
from duramen.problem import Exit, Problem
from duramen.vision.patches import Patches, PatchReduction, check_scores, random_scores

FAMILIES = {"vit": 1, "deit": 2, "dinov2": 1}
"""Tokens that are no patches, the first of each sequence, by the type of the model."""


class ReducedViT:
    """A vision transformer out of which patches leave, until ``remove``.

    Args:
        network: The model.
        reduction: Which patches leave, and where.

    Attributes:
        patches: What was left of the last images.

    Raises:
        Problem: If the model has no layers of the known kind, or the reduction is one that it cannot have.
    """

    def __init__(self, network: Any, reduction: PatchReduction) -> None:
        if reduction.mass is not None:
            raise Problem(
                "A transformer keeps as many patches in every image.", why="some read out the mean of all tokens, and padding would count.",
                fix="`keep` or `cut`, without `mass` or `adaptive`.",
            )  # fmt: skip
        if reduction.kind == "top" and reduction.score not in ("write", "attention"):
            raise Problem(
                f"A transformer has no score `{reduction.score}`.",
                why="it is taken of a scan.",
                fix="`score: write`, or `attention`.",
            )
        self.network, self.reduction = network, reduction
        self.patches: Patches | None = None
        self.layers, attention = transformer_layers(network)
        self.keep = reduction.by_layer(len(self.layers))
        self._seen: Seen | None = None
        self._watched = [network.get_submodule(attention[site]) for site in self.keep]
        for module in self._watched:
            watch(module, self._look)
        self._undo = [override(layer, partial(self._run, index, layer.forward)) for index, layer in enumerate(self.layers)]

    def remove(self) -> None:
        """Gives the layers their own way back."""
        while self._undo:
            self._undo.pop()()
        for module in self._watched:
            watch(module, None)

    def _look(self, seen: Seen) -> None:
        self._seen = seen

    def _run(
        self, index: int, forward: Callable[..., Tensor], hidden: Tensor, attention_mask: Any = None, **options: Any
    ) -> Tensor:
        """One layer, and what leaves after it."""
        if index == 0:
            places = torch.arange(hidden.shape[1], device=hidden.device)
            self.patches = Patches.all_of(len(hidden), places, range(FAMILIES[self.network.config.model_type]))
        patches = self.patches
        assert patches is not None
        if self.reduction.kind == "merge" and not patches.whole:
            attention_mask = patches.sizes.log().to(hidden.dtype)[:, None, None].expand(-1, 1, hidden.shape[1], -1)
        hidden = forward(hidden, attention_mask, **options)
        if index not in self.keep:
            return hidden
        seen, self._seen = self._seen, None
        assert seen is not None
        if self.reduction.kind == "merge":
            features = seen.key.transpose(1, 2).mean(2)
            hidden, self.patches = self.reduction.merged(hidden, features, patches, self.keep[index])
        else:
            drawn = self.reduction.kind == "random"
            scores = random_scores(hidden, index) if drawn else self._scores(seen, index)
            hidden, self.patches = self.reduction.staying(hidden, scores, patches, self.keep[index])
        return hidden

    @torch.no_grad()
    def _scores(self, seen: Seen, layer: int) -> Tensor:
        """What the class token takes from every token, [B, K]."""
        looks = seen.logits(slice(0, 1)).float().softmax(-1)[:, :, 0]
        sizes = 1.0 if self.reduction.score == "attention" else seen.value.float().norm(dim=-1)
        found: Tensor = (looks * sizes).sum(1)
        check_scores(found, layer)
        return found


def transformer_layers(network: nn.Module) -> tuple[nn.ModuleList, list[str]]:
    """The layers of a vision transformer, and the paths of their attention.

    Raises:
        Problem: If it is of no known kind.
    """
    kind = str(getattr(network.config, "model_type", "?"))
    paths = attention_paths(network) if kind in FAMILIES else []
    found = re.match(r"(.*?)\.\d+\.", paths[0]) if paths else None
    if found is None:
        raise Problem(
            f"Patches cannot leave a {kind}.",
            why="hierarchical models need the whole grid for their down-sampling, and of others nothing is known.",
            fix=f"Vim, PlainMamba, or a transformer of the types {', '.join(FAMILIES)}.",
            code=Exit.INCOMPATIBLE,
        )
    layers = network.get_submodule(found[1])
    assert isinstance(layers, nn.ModuleList)
    return layers, paths
