"""Rotation: another basis for the residual stream and for every head's values, in which no channel towers above the others; what the model says stays the same.

"QuaRot" (Ashkboos et al., arXiv 2404.00456) without what it does as a model runs. With the gain of every RMS norm folded into the weights that read it, the norm commutes with an
orthogonal R: the embedding becomes ER, readers W become WR, writers W become RᵀW, the head becomes WR. Within a head values go through an orthogonal matrix of their own, which the
output projection takes back. R is a Hadamard matrix with random signs where one of the width is known, else the Q of a random matrix. Inputs of `down` stay as they are: to rotate
them a model would have to do so as it runs.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import BlockModel, Call, Model, OpenBlock, run_block
from duramen.families.norms import gain_of, last_norm
from duramen.families.table import Group
from duramen.problem import Problem
from duramen.prune.pattern import lasting_zeros
from duramen.quantize.folding import cannot, check_outputs, keep_block, norms_read
from duramen.registry import Settings as MethodSettings
from duramen.registry import method

SAMPLE = 256
"""Tokens by which that is checked."""


class Settings(MethodSettings):
    """Settings of rotation."""

    heads: bool = True
    """Whether values are rotated within every head too."""
    seed: int = 0
    """Of the signs, or of the random matrix."""

    @property
    def undoes(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("zeros", "codes", "rounding", "reduction")


def hadamard(width: int) -> Float[Tensor, "n n"] | None:
    """A matrix of ±1 whose rows are orthogonal: a power of two times one of Paley's, whose width is a prime of the form 4k+3 and one; None where there is no such product."""
    doublings, rest = 0, width
    while rest > 1 and not _is_paley(rest):
        if rest % 2:
            return None
        doublings, rest = doublings + 1, rest // 2
    found = _paley(rest - 1) if rest > 1 else torch.ones(1, 1, dtype=torch.float64)
    for _ in range(doublings):
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def _is_paley(width: int) -> bool:
    prime = width - 1
    return prime % 4 == 3 and all(prime % factor for factor in range(2, int(prime**0.5) + 1))


def _paley(prime: int) -> Float[Tensor, "n n"]:
    """Paley's first construction: 1 + S, S skew with the quadratic characters of differences."""
    squares = {number * number % prime for number in range(1, prime)}
    characters = torch.tensor([0] + [1 if number in squares else -1 for number in range(1, prime)], dtype=torch.float64)
    places = torch.arange(prime)
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = characters[(places[:, None] - places[None]) % prime]
    return skew + torch.eye(prime + 1, dtype=torch.float64)


def orthogonal(width: int, seed: int) -> Float[Tensor, "n n"]:
    """An orthogonal matrix that spreads every direction over all channels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    found = hadamard(width)
    if found is None:
        drawn: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        return drawn
    signs = 2 * torch.randint(0, 2, (width,), generator=generator).double() - 1
    spread: Tensor = signs[:, None] * found / width**0.5
    return spread


@method("rotate", title="Rotation", paper="arXiv 2404.00456", kind="quantize", settings=Settings)
@torch.no_grad()
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Rotates a model; its weights become others, its logits do not.

    Args:
        model: The model; one in memory is changed in place.
        tokens: The first of them are run through every block before and after, [S, T].
        walk: How to walk.
        **settings: See ``Settings``.

    Returns:
        Nothing: no layer loses anything.

    Raises:
        Problem: On an architecture whose residual stream cannot be rotated, a sparse model, or a block whose outputs change; a model in memory is then in part another one.
    """
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    blocks = BlockModel.of(model)
    group = _stream(blocks)
    rotation = orthogonal(blocks.config.hidden_size, chosen.seed).to(blocks.device)
    turn = orthogonal(blocks.sizes(0).head, chosen.seed + 1).to(blocks.device) if chosen.heads else None
    batch = tokens[:1, :SAMPLE]
    hidden, calls = blocks.capture(batch)
    walk.outside = rotate_outside(blocks, rotation)
    if blocks.checkpoint is not None:
        walk.files["config.json"] = json.dumps(blocks.checkpoint.config | {"tie_word_embeddings": False}, indent=2)
    turned = (hidden.double() @ rotation).to(hidden.dtype)
    for index in range(len(blocks.blocks)):
        kept = walk.store.load(index) if walk.store else None
        with blocks.opened(index, edited=kept[0] if kept else None) as block:
            if kept is None:
                hidden = _rotate_block(blocks, block, group, rotation, turn, hidden, calls[index])
            turned = run_block(block.module, turned, calls[index])
            if kept is None:
                check_outputs(blocks, index, turned, hidden.double() @ rotation, "rotated")
                keep_block(walk, block, [{"layer": layer.name} for layer in block.layers.values() if layer.edited])
            else:
                hidden = (turned.double() @ rotation.T).to(hidden.dtype)
    walk.final_hidden, walk.first_batch = turned, batch
    walk.said = "The residual stream is in another basis, and gains of norms are part of the weights that read them; no output changed but for rounding."
    return []


def _stream(model: BlockModel) -> Group:
    """What the table says of the residual stream.

    Raises:
        Problem: If it says nothing.
    """
    group = next((each for each in model.family.groups if each.kind == "width"), None)
    if group is None:
        raise _cannot(model, f"nothing is known of what reads and writes the residual stream of the family {model.family.name}")
    return group


def rotate_outside(model: BlockModel, rotation: Float[Tensor, "D D"]) -> dict[str, Tensor]:
    """Rotates the embedding and the head of a network, unties them, and folds the last norm into the head; the new tensors by their names, as stored.

    Raises:
        Problem: If one of the three is not what it is in most models.
    """
    network: Any = model.network
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    norm_name = last_norm(model)
    if norm_name is None:
        raise _cannot(model, "no norm stands before its head")
    norm = network.get_submodule(norm_name)
    names = {id(module): name for name, module in network.named_modules()}
    width = model.config.hidden_size
    if embedding.weight.shape[1] != width or head.weight.shape[1] != width:
        raise _cannot(model, "its embedding is not as wide as its blocks")
    gain, plain = _gain(model, norm)
    stored = dict(model.stored_outside())
    rows = stored[f"{names[id(embedding)]}.weight"]
    columns = stored.get(f"{names[id(head)]}.weight", rows)
    turn, gain = rotation.to(rows.device), gain.to(rows.device)
    new = {
        f"{names[id(embedding)]}.weight": (rows.double() @ turn).to(rows.dtype),
        f"{names[id(head)]}.weight": ((columns.double() * gain) @ turn).to(columns.dtype),
        f"{norm_name}.weight": torch.full_like(stored[f"{norm_name}.weight"], plain),
    }
    like = embedding.weight
    for module in (embedding, head):
        module.weight = nn.Parameter(new[f"{names[id(module)]}.weight"].to(like.device, like.dtype), requires_grad=False)
    norm.weight.data.fill_(plain)
    model.config.tie_word_embeddings = False
    return new


def _gain(model: BlockModel, norm: nn.Module) -> tuple[Float[Tensor, "D"], float]:
    """See ``gain_of``.

    Raises:
        Problem: If it is another kind of norm.
    """
    found = gain_of(norm)
    if found is None:
        raise _cannot(model, "its norms subtract the mean, or add something, so that they do not commute with a rotation")
    return found


def _cannot(model: BlockModel, why: str) -> Problem:
    return cannot(model, "rotated", why)


def _rotate_block(
    model: BlockModel, block: OpenBlock, group: Group, rotation: Tensor, turn: Tensor | None, hidden: Tensor, call: Call
) -> Tensor:
    """Rotates an open block, and its values by ``turn`` where v and o have projections of their own; its outputs before that."""
    members = {each.path: each for each in group.members if not each.outside}
    layers = {path: layer for path, layer in block.layers.items() if f"{path}.weight" in members}
    for layer in layers.values():
        if bool(lasting_zeros(layer.read()).any()):
            raise Problem(
                f"Rotation would fill the removed weights of {layer.name}.",
                why="every weight becomes a mixture of a whole row or column.",
                fix="rotate before pruning.",
            )
    with norms_read(block, layers) as norms:
        before = run_block(block.module, hidden, call)
    gains = {}
    for norm_path in {norms[path] for path in layers.keys() & norms.keys()}:
        norm = block.module.get_submodule(norm_path)
        gains[norm_path], plain = _gain(model, norm)
        norm.weight.data.fill_(plain)  # type: ignore[operator]
        name = f"{model.family.blocks}.{block.index}.{norm_path}.weight"
        block.tensors[name] = torch.full_like(block.tensors[name], plain)
    turns = turn is not None and {"v", "o"} <= {layer.projection.role for layer in layers.values()}
    for path, layer in layers.items():
        weight, bias = layer.read().double(), None if layer.bias is None else layer.bias.double()
        if not members[f"{path}.weight"].reads:
            weight, bias = rotation.T @ weight, None if bias is None else rotation.T @ bias
        elif path in norms:
            weight = (weight * gains[norms[path]]) @ rotation
        else:
            raise _cannot(model, f"{layer.name} reads the residual stream, but not behind a norm of its own")
        if turn is not None and turns and layer.projection.role == "v":
            weight = torch.einsum("pq,gpd->gqd", turn, weight.view(-1, len(turn), weight.shape[1])).reshape(weight.shape)
            bias = None if bias is None else (bias.view(-1, len(turn)) @ turn).flatten()
        elif turn is not None and turns and layer.projection.role == "o":
            weight = torch.einsum("pq,dhp->dhq", turn, weight.view(len(weight), -1, len(turn))).reshape(weight.shape)
        layer.write(weight, bias=bias)
    return before
