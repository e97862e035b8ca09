"""PlainMamba, a state-space model of images that goes through the grid of patches by rows and by columns, there and back (arXiv 2403.17695); names of weights are the official ones.

A block normalises the stream, projects it to x and a gate z, convolves x on the grid, and scans it along four paths with one set of weights, to whose B the direction is added by which a step was
reached; the sum of all four, gated, is added to the stream. The head reads the mean of all patches.

The official code has two habits that its weights have learned: Δ, B and C of a step are those of the patch with the step's *number*, only x that of the patch on the path (``official_pairing``); and the
bias of Δ is added twice (``double_dt_bias``). Models that are trained here have neither.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int
from torch import Tensor, nn

from duramen.ssm.fold import fold, fold_own, gaps, removed_steps
from duramen.ssm.mixer import Seen
from duramen.ssm.paths import arrivals, four_paths
from duramen.ssm.selective import selective_scan
from duramen.vision.patches import Patches, PatchReduction
from duramen.vision.stream import VisionConfig, VisionModel, begin_scan

STEM = 64
"""Channels of the convolutions before the patches."""


@strict
class PlainMambaConfig(VisionConfig):
    """Config of PlainMamba; the defaults are those of PlainMamba-L1 on ImageNet, but for the habits of the official code.

    Attributes:
        stem: Convolutions 3×3 between the first, which halves the image, and the patches; None for patches of the image itself.
        local: Whether a convolution on the grid takes the place of the stream after the first block.
        kernel_size: Width of the blocks' convolution on the grid.
        official_pairing: Whether Δ, B and C of a step are those of the patch with the step's number.
        double_dt_bias: Whether the bias of Δ counts twice.
    """

    model_type = "plainmamba"

    stem: int | None = 1
    local: bool = False
    kernel_size: int = 7
    official_pairing: bool = False
    double_dt_bias: bool = False


@lru_cache(maxsize=8)
def _ways(side: int, device: torch.device) -> tuple[Int[Tensor, "4 T"], Int[Tensor, "4 T"]]:
    """Of the four paths through a grid: the step of every cell, and how each step was reached."""
    paths = four_paths(side, side)
    return paths.argsort(1).to(device), torch.stack([arrivals(path, side) for path in paths]).to(device)


class PlainMambaMixer(nn.Module):
    """What a block adds to the stream."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.config, self.rank = config, -(-config.hidden_size // 16)
        inner, states = 2 * config.hidden_size, config.state_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner)
        self.conv2d = nn.Conv2d(inner, inner, config.kernel_size, padding=config.kernel_size // 2, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log, self.D = nn.Parameter(torch.zeros(inner, states)), nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size)
        self.direction_Bs = nn.Parameter(torch.zeros(5, states))

    def forward(
        self, hidden: Float[Tensor, "B K D"], patches: Patches, reduction: PatchReduction | None, *, watch: bool
    ) -> tuple[Float[Tensor, "B K D"], list[Seen]]:
        """The sum of four scans, gated and projected; and what each made of the patches, in their order."""
        x, gate = self.in_proj(hidden).chunk(2, -1)
        grid = nn.functional.silu(self._on_grid(x, patches))
        here = patches.positions.clamp_max(grid.shape[1] - 1)
        x = grid.gather(1, here[..., None].expand(-1, -1, grid.shape[2]))
        told = self.x_proj(grid if self.config.official_pairing else x)
        low, b, c = torch.split(told, [self.rank, self.config.state_size, self.config.state_size], -1)
        bias = self.dt_proj.bias * (2 if self.config.double_dt_bias else 1)
        steps = nn.functional.softplus(low @ self.dt_proj.weight.T + bias)
        found = self._four_scans(x, steps, b, c, bias, here, patches, reduction)
        y = torch.stack([each.outputs for each in found]).sum(0)
        return self.out_proj(y * nn.functional.silu(gate)), found if watch else []

    def _on_grid(self, x: Float[Tensor, "B K E"], patches: Patches) -> Float[Tensor, "B T E"]:
        """The convolution at all places, with zeros where patches have left."""
        side = self.config.side
        index = patches.positions.clamp_max(side * side)[..., None].expand(-1, -1, x.shape[2])
        grid = x.new_zeros(len(x), side * side + 1, x.shape[2]).scatter(1, index, x)[:, :-1]
        y: Tensor = self.conv2d(grid.transpose(1, 2).reshape(len(x), -1, side, side))
        return y.flatten(2).transpose(1, 2)

    def _four_scans(
        self,
        x: Float[Tensor, "B K E"],
        steps: Float[Tensor, "B n E"],
        b: Float[Tensor, "B n N"],
        c: Float[Tensor, "B n N"],
        bias: Float[Tensor, "E"],
        here: Int[Tensor, "B K"],
        patches: Patches,
        reduction: PatchReduction | None,
    ) -> list[Seen]:
        """All four scans at once, as four times as many sequences; each one's y in the order of patches, and what it wrote for each of them."""
        ranks, reached = _ways(self.config.side, here.device)
        length = ranks.shape[1]
        times = ranks[:, here]
        if patches.valid is not None:
            times = torch.where(patches.valid, times, length + torch.arange(here.shape[1], device=here.device))
        times, slots = (each.flatten(0, 1) for each in times.sort(-1))
        at = times.clamp_max(length - 1)
        reached = reached.repeat_interleave(len(here), 0).gather(1, at)
        valid = None if patches.valid is None else patches.valid.repeat(4, 1).gather(1, slots)
        source = at if self.config.official_pairing else slots

        def along(values: Tensor, index: Tensor) -> Tensor:
            return values.repeat(4, 1, 1).gather(1, index[..., None].expand(-1, -1, values.shape[2]))

        inputs, writes = along(x, slots), along(steps, source)
        decays = writes
        if reduction is not None and not patches.whole and reduction.gap_step != "hold":
            if self.config.official_pairing:
                decays = fold_own(steps.repeat(4, 1, 1), at)
            else:
                gap, _ = gaps(times, length)
                gap = gap if valid is None else gap * valid
                decays = fold(writes, gap, removed_steps(reduction.gap_step, writes, bias, valid))
        toward = along(b, source) + self.direction_Bs[reached]
        y, _ = selective_scan(inputs, decays, writes, -self.A_log.exp(), toward, along(c, source), skip=self.D, valid=valid)
        back = slots.argsort(1)[..., None]
        parts = [each.gather(1, back.expand(-1, -1, each.shape[2])) for each in (y, writes, inputs, toward)]
        return [Seen(*each) for each in zip(*(part.chunk(4) for part in parts), strict=True)]


class PlainMambaLayer(nn.Module):
    """A norm and a mixer around the stream; in some models a convolution after it."""

    def __init__(self, config: PlainMambaConfig, *, local: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.side, self.norm, self.mamba = config.side, nn.LayerNorm(width), PlainMambaMixer(config)
        self.dw = (
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.GELU())
            if local
            else None
        )

    def forward(
        self, hidden: Float[Tensor, "B K D"], patches: Patches, reduction: PatchReduction | None, *, watch: bool = False
    ) -> tuple[Float[Tensor, "B K D"], list[Seen]]:
        """The stream after the block; and what each path made of the patches, in their order."""
        added, seen = self.mamba(self.norm(hidden), patches, reduction, watch=watch)
        hidden = hidden + added
        if self.dw is not None:
            grid = hidden.transpose(1, 2).reshape(len(hidden), -1, self.side, self.side)
            hidden = self.dw(grid).flatten(2).transpose(1, 2)
        return hidden, seen


class _Stem(nn.Module):
    """Convolutions before the patches, and their projection, under their official names."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        channels, size = config.num_channels, config.patch_size
        if config.stem is not None:
            self.stem = nn.Sequential(
                nn.Conv2d(channels, STEM, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(STEM), nn.ReLU()
            )
            parts = (
                part
                for _ in range(config.stem)
                for part in (nn.Conv2d(STEM, STEM, 3, padding=1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU())
            )
            self.convs = nn.Sequential(*parts)
            channels, size = STEM, size // 2
        self.projection = nn.Conv2d(channels, config.hidden_size, size, stride=size)

    def forward(self, pixel_values: Float[Tensor, "B c H W"]) -> Float[Tensor, "B T D"]:
        """Patches, row by row."""
        x = self.convs(self.stem(pixel_values)) if hasattr(self, "stem") else pixel_values
        return self.projection(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class PlainMambaForImageClassification(VisionModel):
    """PlainMamba with its head."""

    config_class = PlainMambaConfig

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__(config)
        self.patch_embed = _Stem(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.side**2, config.hidden_size))
        self.layers = nn.ModuleList(
            PlainMambaLayer(config, local=config.local and index == 0) for index in range(config.num_hidden_layers)
        )
        self.ln1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @property
    def ranks(self) -> Int[Tensor, "T"]:
        """The step of every patch on the first path."""
        return four_paths(self.config.side, self.config.side)[0].argsort()

    def embed(self, pixel_values: Float[Tensor, "B c H W"]) -> Float[Tensor, "B T D"]:
        """Patches with the vectors of their places."""
        return self.patch_embed(pixel_values) + self.pos_embed  # type: ignore[no-any-return]

    def read(self, hidden: Float[Tensor, "B K D"], patches: Patches) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B C"]]:
        """The head on the mean of all patches, each counted as often as it stands for one."""
        hidden = self.ln1(hidden)
        sizes = patches.sizes.to(hidden.dtype)[..., None]
        return hidden, self.head((hidden * sizes).sum(1) / sizes.sum(1))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PlainMambaMixer):
            begin_scan(module.A_log, module.D, module.dt_proj)
            nn.init.trunc_normal_(module.direction_Bs, std=0.02)
            nn.init.kaiming_uniform_(module.conv2d.weight, a=5**0.5)
        if isinstance(module, PlainMambaForImageClassification):
            nn.init.trunc_normal_(module.pos_embed, std=0.02)
