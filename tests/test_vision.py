"""Vim and PlainMamba: against references that go step by step, with all patches and with some; their official sizes and names; which patches leave."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.ssm.paths import arrivals, four_paths
from duramen.vision import PlainMambaConfig, PlainMambaForImageClassification, VimConfig, VimForImageClassification
from duramen.vision.patches import Patches, PatchReduction
from oracles import vision as oracle

SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "image_size": 10, "patch_size": 2, "state_size": 4, "num_labels": 3}
KINDS = {
    "vim": (VimForImageClassification, VimConfig, {}, oracle.vim),
    "plainmamba": (PlainMambaForImageClassification, PlainMambaConfig, {"stem": None, "kernel_size": 3}, oracle.plainmamba),
    "plainmamba, official": (
        PlainMambaForImageClassification, PlainMambaConfig,
        {"stem": None, "kernel_size": 3, "official_pairing": True, "double_dt_bias": True}, oracle.plainmamba,
    ),
}  # fmt: skip


def made(kind, seed=0, **changes):
    """A model in float64 all of whose parameters matter."""
    model, config, own, _ = KINDS[kind]
    torch.manual_seed(seed)
    network = model(config(**SMALL | own | changes)).double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.endswith("A_log") and not name.endswith("A_b_log"):
                parameter.add_(0.15 * torch.randn_like(parameter))
    return network


def images(count=3, seed=1, size=10):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (4, 1), (3, 4), (4, 5), (7, 7)])
def test_paths_visit_every_cell_by_neighbours(height, width):
    rows, rows_back, columns, columns_back = four_paths(height, width)
    for way, back in ((rows, rows_back), (columns, columns_back)):
        assert torch.equal(back, way.flip(0))
        assert sorted(way.tolist()) == list(range(height * width))
        apart = (way[1:] // width - way[:-1] // width).abs() + (way[1:] % width - way[:-1] % width).abs()
        assert (apart == 1).all()
        moves = [None, (0, 1), (0, -1), (-1, 0), (1, 0)]
        at, found = way[0], [way[0]]
        for direction in arrivals(way, width)[1:]:
            down, right = moves[int(direction)]
            at = at + down * width + right
            found.append(at)
        assert torch.equal(torch.stack(found), way)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 10, 14])
def test_dense_models_are_what_the_papers_say(kind, size):
    network, batch = made(kind, image_size=size), images(2, size=size)
    found = network(batch).logits
    for row, image in zip(found, batch, strict=True):
        expected = KINDS[kind][3](network.state_dict(), image, network.config)
        torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mass", [None, 0.6])
def test_alignment_is_the_full_scan_with_zeros(kind, mass):
    """Forward and gradient; with ``mass`` images keep different numbers, so that padding takes part."""
    network, batch = made(kind), images(4)
    reduction = {"sites": [0], "keep": [0.6], "mass": mass}
    with torch.no_grad():
        network.config.reduction = reduction
        first = network(batch).positions
        network.config.reduction = reduction | {"sites": [0, 2]}
        found = network(batch)
    assert found.positions.shape[1] < first.shape[1] < len(network.ranks)
    batch.requires_grad_(True)
    logits = network(batch).logits
    gradient = torch.autograd.grad(logits.square().sum(), [batch, *network.layers[3].parameters()])
    expected = []
    for row, image in enumerate(batch):
        left = {layer: mask(each[row], len(network.ranks)) for layer, each in ((1, first), (3, found.positions))}
        expected.append(
            KINDS[kind][3](dict(network.named_parameters()) | dict(network.named_buffers()), image, network.config, left)
        )
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-10, atol=1e-10)
    whole = torch.autograd.grad(torch.stack(expected).square().sum(), [batch, *network.layers[3].parameters()])
    for mine, theirs in zip(gradient, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def mask(positions, length):
    found = torch.zeros(length, dtype=torch.bool)
    found[positions[positions < length]] = True
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_is_dense_and_packing_without_gaps_is_a_shorter_sequence(kind):
    network, batch = made(kind), images()
    dense = network(batch).logits
    network.config.reduction = {"sites": [1], "keep": [1.0]}
    torch.testing.assert_close(network(batch).logits, dense, rtol=1e-12, atol=1e-12)
    if kind == "vim":
        network.config.reduction = {"sites": [1], "keep": [0.5], "gap_step": "hold", "aligned": False}
        found = network(batch)
        hidden = network.embed(batch)
        whole = Patches.all_of(3, network.ranks, network.extra)
        for layer in network.layers[:2]:
            hidden, _ = layer(hidden, whole, None)
        hidden = hidden.gather(1, found.positions[..., None].expand(-1, -1, 16))
        for layer in network.layers[2:]:
            hidden, _ = layer(hidden, Patches.all_of(3, torch.arange(hidden.shape[1])), None)
        cls = network.norm_f(hidden)[found.positions == network.extra]
        torch.testing.assert_close(network.head(cls), found.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "config", "count"),
    [
        (VimForImageClassification, VimConfig(hidden_size=192, num_labels=1000), 7_148_008),
        (VimForImageClassification, VimConfig(hidden_size=384, num_labels=1000), 25_796_584),
        (VimForImageClassification, VimConfig(hidden_size=768, num_labels=1000), 97_598_440),
        (PlainMambaForImageClassification, PlainMambaConfig(local=True, num_labels=1000), 7_551_656),
        (PlainMambaForImageClassification, PlainMambaConfig(hidden_size=384, stem=2, num_labels=1000), 26_145_832),
        (PlainMambaForImageClassification, PlainMambaConfig(hidden_size=448, num_hidden_layers=36, stem=2, num_labels=1000), 50_956_456),
    ],
)  # fmt: skip
def test_official_sizes(model, config, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in model(config).parameters()) == count


@given(st.integers(1, 25), st.floats(0.05, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_as_many_stay_as_were_asked_for(patches, keep, cls):
    length = patches + cls
    reduction = PatchReduction(sites=(0,), keep=(keep,))
    state = Patches.all_of(2, torch.arange(length), length // 2 if cls else None)
    scores = torch.randn(2, length).round(decimals=1)
    slots, valid = reduction._staying(scores, state, keep)
    assert valid is None
    after = state.after(slots, valid)
    from math import ceil

    assert slots.shape[1] == ceil(keep * patches - 1e-9) + cls
    assert (slots[:, 1:] > slots[:, :-1]).all()
    if cls:
        assert (after.positions == length // 2).sum() == 2
    for row in range(2):
        assert after.representative[row][after.positions[row]].tolist() == list(range(slots.shape[1]))
        gone = [place for place in range(length) if place not in after.positions[row].tolist()]
        if gone:
            assert scores[row][gone].max() <= min(
                [float(scores[row][place]) for place in after.positions[row] if place != state.extra], default=9
            )
