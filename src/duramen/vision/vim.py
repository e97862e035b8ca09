"""Vim, a state-space model of images that reads the sequence of patches in both directions (arXiv 2401.09417, "bimamba v2"); names of weights are the official ones.

A block normalises the stream, projects it to x and a gate z, and runs x through a convolution and a scan forwards, and with weights of its own backwards; the mean of both, gated, is added
to the stream. The class token stands in the middle of the sequence and is what the head reads.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int
from torch import Tensor, nn

from duramen.ssm.conv import aligned_conv, causal_conv
from duramen.ssm.mixer import Passage, Seen
from duramen.ssm.selective import selective_scan
from duramen.vision.patches import Patches, PatchReduction
from duramen.vision.stream import VisionConfig, VisionModel, begin_scan

EPS = 1e-5


@strict
class VimConfig(VisionConfig):
    """Config of Vim; the defaults are those of Vim-Tiny on ImageNet.

    Attributes:
        kernel_size: Taps of the causal convolutions.
    """

    model_type = "vim"

    kernel_size: int = 4


class Branch:
    """The parameters of one direction of a mixer, whose names end in ``_b`` for the backward one."""

    def __init__(self, mixer: VimMixer, backward: bool) -> None:
        end = "_b" if backward else ""
        self.conv, self.x_proj, self.dt_proj = (getattr(mixer, name + end) for name in ("conv1d", "x_proj", "dt_proj"))
        self.a_log, self.skip = (mixer.A_b_log, mixer.D_b) if backward else (mixer.A_log, mixer.D)


class VimMixer(nn.Module):
    """What a block adds to the stream."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        width, inner, states = config.hidden_size, 2 * config.hidden_size, config.state_size
        self.rank, self.states = -(-width // 16), states
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        for end in ("", "_b"):
            setattr(self, f"conv1d{end}", nn.Conv1d(inner, inner, config.kernel_size, groups=inner))
            setattr(self, f"x_proj{end}", nn.Linear(inner, self.rank + 2 * states, bias=False))
            setattr(self, f"dt_proj{end}", nn.Linear(self.rank, inner))
        self.A_log, self.A_b_log = (nn.Parameter(torch.zeros(inner, states)) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(inner)) for _ in range(2))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Float[Tensor, "B K D"], ways: tuple[Passage, Passage]) -> Float[Tensor, "B K D"]:
        """The mean of both directions, gated and projected.

        Args:
            hidden: The normed stream.
            ways: What either direction is told of its tokens, and keeps of them if it watches, both in its own order.
        """
        x, gate = self.in_proj(hidden).chunk(2, -1)
        y = self.scan(x, Branch(self, backward=False), ways[0])
        y = y + self.scan(x.flip(1), Branch(self, backward=True), ways[1]).flip(1)
        return self.out_proj(y / 2 * nn.functional.silu(gate))  # type: ignore[no-any-return]

    def scan(self, x: Float[Tensor, "B K E"], branch: Branch, way: Passage) -> Float[Tensor, "B K E"]:
        """Convolution and scan of one direction, over tokens in its own order."""
        weight, bias = branch.conv.weight.squeeze(1), branch.conv.bias
        x = x if way.valid is None else x * way.valid[..., None]
        if way.aligned and way.places is not None:
            x = aligned_conv(x, weight, bias, way.places)
        else:
            x, _ = causal_conv(x, weight, bias, valid=way.valid)
        x = nn.functional.silu(x)
        low, b, c = torch.split(branch.x_proj(x), [self.rank, self.states, self.states], -1)
        steps = nn.functional.softplus(branch.dt_proj(low))
        decays = way.decays(steps, branch.dt_proj.bias)
        y, _ = selective_scan(x, decays, steps, -branch.a_log.exp(), b, c, skip=branch.skip, valid=way.valid)
        if way.watch:
            way.seen = Seen(y.detach(), steps.detach(), x.detach(), b.detach())
        return y


class VimLayer(nn.Module):
    """A norm and a mixer around the stream."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(config.hidden_size, eps=EPS), VimMixer(config)

    def forward(
        self, hidden: Float[Tensor, "B K D"], patches: Patches, reduction: PatchReduction | None, *, watch: bool = False
    ) -> tuple[Float[Tensor, "B K D"], list[Seen]]:
        """The stream after the block; and what each direction made of the tokens, in their order."""
        ways = both_ways(patches, reduction, watch)
        hidden = hidden + self.mixer(self.norm(hidden), ways)
        if not watch:
            return hidden, []
        assert ways[0].seen is not None
        assert ways[1].seen is not None
        return hidden, [ways[0].seen, Seen(*(each.flip(1) for each in ways[1].seen))]


def both_ways(patches: Patches, reduction: PatchReduction | None, watch: bool) -> tuple[Passage, Passage]:
    """What either direction is told: places, and which tokens are there, in its own order."""
    forward = Passage(valid=patches.valid, watch=watch)
    backward = Passage(valid=None if patches.valid is None else patches.valid.flip(1), watch=watch)
    if reduction is not None and not patches.whole:
        length = len(patches.ranks)
        for way, places in ((forward, patches.positions), (backward, length - 1 - patches.positions.flip(1))):
            way.places, way.gap_step, way.aligned = places, reduction.gap_step, reduction.aligned
    return forward, backward


class _Projection(nn.Module):
    """Holds the patches' projection under its official name."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)


class VimForImageClassification(VisionModel):
    """Vim with its head."""

    config_class = VimConfig

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config)
        self.extra = config.side**2 // 2
        self.patch_embed = _Projection(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.side**2 + 1, config.hidden_size))
        self.layers = nn.ModuleList(VimLayer(config) for _ in range(config.num_hidden_layers))
        self.norm_f = nn.RMSNorm(config.hidden_size, eps=EPS)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @property
    def ranks(self) -> Int[Tensor, "T"]:
        """Places in the order of the sequence."""
        return torch.arange(self.pos_embed.shape[1])

    def embed(self, pixel_values: Float[Tensor, "B c H W"]) -> Float[Tensor, "B T D"]:
        """Patches row by row, the class token amid them, and the vectors of their places."""
        patches = self.patch_embed.proj(pixel_values).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat([patches[:, : self.extra], cls, patches[:, self.extra :]], 1) + self.pos_embed

    def read(self, hidden: Float[Tensor, "B K D"], patches: Patches) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B C"]]:
        """The head on the class token, which is where it always was."""
        hidden = self.norm_f(hidden)
        return hidden, self.head(hidden[patches.positions == self.extra])

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VimMixer):
            for backward in (False, True):
                branch: Any = Branch(module, backward)
                begin_scan(branch.a_log, branch.skip, branch.dt_proj)
                nn.init.kaiming_uniform_(branch.conv.weight, a=5**0.5)
                nn.init.zeros_(branch.conv.bias)
        if isinstance(module, VimForImageClassification):
            nn.init.trunc_normal_(module.cls_token, std=0.02)
            nn.init.trunc_normal_(module.pos_embed, std=0.02)
