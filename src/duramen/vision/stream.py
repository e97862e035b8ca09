"""What the state-space models of images share: a sequence of patches, blocks one after another, and patches that leave after some of them.

Which patches leave is part of the forward pass and of the config (``reduction``), so that training, evaluation and use see the same network. Scores are detached; no gradient passes through the choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from duramen.problem import Problem
from duramen.vision.patches import Patches, PatchReduction, patches_across


@strict
class VisionConfig(PreTrainedConfig):  # type: ignore[misc]
    """What both architectures are told.

    Attributes:
        hidden_size: Width D of the residual stream; blocks work at twice of it.
        num_hidden_layers: Blocks.
        image_size: Height and width of images, pixels; a multiple of ``patch_size``.
        patch_size: Of a patch, pixels.
        num_channels: Of an image.
        state_size: N of the scans.
        reduction: Which patches leave, and where; see ``duramen.vision.patches.PatchReduction``. None for none.
    """

    hidden_size: int = 192
    num_hidden_layers: int = 24
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    state_size: int = 16
    reduction: dict[str, Any] | None = None

    @property
    def side(self) -> int:
        """Patches in a row.

        Raises:
            Problem: If patches do not fill the image.
        """
        return patches_across(self.image_size, self.patch_size)


@dataclass
class ImageOutput(ModelOutput):  # type: ignore[misc]
    """What a model says of images.

    Attributes:
        loss: Mean cross-entropy; None without labels.
        logits: [B, classes].
        last_hidden_state: What is left after the last norm, [B, K, D].
        positions: Where each of them was in the sequence, [B, K]; beyond its end for padding.
        representative: For every patch of the grid, the slot that stands for it, [B, patches].
        counts: How many tokens every image had left after each site, [B, sites].
    """

    loss: Float[Tensor, ""] | None = None
    logits: Float[Tensor, "B C"] | None = None
    last_hidden_state: Float[Tensor, "B K D"] | None = None
    positions: Int[Tensor, "B K"] | None = None
    representative: Int[Tensor, "B P"] | None = None
    counts: Int[Tensor, "B S"] | None = None

    def feature_map(self) -> Float[Tensor, "B D h w"]:
        """What stands for every patch, on the grid: where patches have left, the nearest that stayed; for a head that predicts every place."""
        assert self.last_hidden_state is not None
        assert self.representative is not None
        slots = self.representative[..., None].expand(-1, -1, self.last_hidden_state.shape[2])
        side = round(slots.shape[1] ** 0.5)
        found: Tensor = self.last_hidden_state.gather(1, slots).transpose(1, 2).reshape(len(slots), -1, side, side)
        return found


class VisionModel(PreTrainedModel):  # type: ignore[misc]
    """Embeds, runs the layers, lets patches leave, reads out; subclasses say how.

    Attributes:
        layers: Each takes [B, K, D], the patches that are left, the reduction, and whether to ``watch``; and gives [B, K, D] and what each path's scan made of the tokens, in their order.
        extra: The place of a token that is no patch, in the sequence; None if there is none.
    """

    config: VisionConfig
    config_class = VisionConfig
    main_input_name = "pixel_values"
    layers: nn.ModuleList
    extra: int | None = None

    @property
    def ranks(self) -> Int[Tensor, "T"]:
        """The step of every place of the sequence on the first path."""
        raise NotImplementedError

    def embed(self, pixel_values: Float[Tensor, "B c H W"]) -> Float[Tensor, "B T D"]:
        """The sequence before the first layer."""
        raise NotImplementedError

    def read(self, hidden: Float[Tensor, "B K D"], patches: Patches) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B C"]]:
        """The last norm, and the logits."""
        raise NotImplementedError

    def forward(self, pixel_values: Float[Tensor, "B c H W"], labels: Int[Tensor, "B"] | None = None, **_: Any) -> ImageOutput:
        """Runs the model, with its reduction if it has one.

        Args:
            pixel_values: Images, normalised.
            labels: Classes, for the loss.

        Raises:
            Problem: If images are not of the model's size, or scores are not finite.
        """
        config = self.config
        shape = (config.num_channels, config.image_size, config.image_size)
        if tuple(pixel_values.shape[1:]) != shape:
            raise Problem(
                f"Images of {'x'.join(map(str, pixel_values.shape[1:]))} do not fit a model of {'x'.join(map(str, shape))}.",
                why="every place of its grid has a vector of its own.",
                fix="the image processor of the model's folder.",
            )
        reduction = None if config.reduction is None else PatchReduction.model_validate(config.reduction)
        keep = {} if reduction is None else reduction.by_layer(len(self.layers))
        hidden = self.embed(pixel_values)
        counts = []
        patches = Patches.all_of(len(hidden), self.ranks.to(hidden.device), () if self.extra is None else (self.extra,))
        for index, layer in enumerate(self.layers):
            hidden, seen = layer(hidden, patches, reduction, watch=index in keep)
            if reduction is not None and index in keep:
                hidden, patches = reduction.leave(hidden, patches, seen, keep[index], index)
                counts.append(patches.counts)
        hidden, logits = self.read(hidden, patches)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        left = torch.stack(counts, 1) if counts else None
        return ImageOutput(loss, logits, hidden, patches.positions, patches.of_grid, left)

    def _init_weights(self, module: nn.Module) -> None:
        """As Mamba's layers and vision transformers begin: small normal projections, steps from .001 to .1, decays from 1 to N."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def begin_scan(a_log: nn.Parameter, skip: nn.Parameter, dt_proj: nn.Linear) -> None:
    """The first values of a scan: A from -1 to -N in every channel, D one, steps from .001 to .1 by the bias (arXiv 2312.00752)."""
    with torch.no_grad():
        a_log.copy_(torch.arange(1.0, a_log.shape[1] + 1).log().expand_as(a_log))
        skip.fill_(1)
        rank = dt_proj.weight.shape[1]
        nn.init.uniform_(dt_proj.weight, -(rank**-0.5), rank**-0.5)
        steps = torch.exp(torch.empty_like(dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)))
        dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))
