"""Vim and PlainMamba: against references that go step by step, with all patches and with some; their official sizes and names; which patches leave."""

from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForImageClassification

from duramen.problem import Problem
from duramen.ssm.paths import arrivals, four_paths
from duramen.tokens.schedule import kept_count, token_fraction
from duramen.vision import PlainMambaConfig, PlainMambaForImageClassification, VimConfig, VimForImageClassification
from duramen.vision.cost import patch_costs
from duramen.vision.official import from_official, read_official
from duramen.vision.opening import tokens_outside
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
@pytest.mark.parametrize("mass", [None, 0.6, "one keeps all"])
def test_alignment_is_the_full_scan_with_zeros(kind, mass, monkeypatch):
    """Forward and gradient; with ``mass`` images keep different numbers, so that padding takes part, also as long as the whole."""
    network, batch = made(kind), images(4)
    if mass == "one keeps all":

        def counts(self, ranked, *_):
            return torch.tensor([ranked.shape[1], 20, 9, 7] if (ranked > -torch.inf).all() else [ranked.shape[1], 11, 5, 7])

        monkeypatch.setattr(PatchReduction, "_counts", counts)
        mass = None
    reduction = {"sites": [0], "keep": [0.6], "mass": mass}
    with torch.no_grad():
        network.config.reduction = reduction
        first = network(batch).positions
        network.config.reduction = reduction | {"sites": [0, 2]}
        found = network(batch)
    assert found.positions.shape[1] <= first.shape[1] <= len(network.ranks)
    assert found.counts[:, 1].sum() < found.counts[:, 0].sum() < len(network.ranks) * len(batch)
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
        whole = Patches.all_of(3, network.ranks, tokens_outside(network))
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
    state = Patches.all_of(2, torch.arange(length), [length // 2] * cls)
    scores = torch.randn(2, length).round(decimals=1)
    slots, valid = reduction._staying(scores, state, keep)
    assert valid is None
    after = state.after(slots, valid)
    assert slots.shape[1] == ceil(keep * patches - 1e-9) + cls
    assert (slots[:, 1:] > slots[:, :-1]).all()
    if cls:
        assert (after.positions == length // 2).sum() == 2
    for row in range(2):
        assert after.representative[row][after.positions[row]].tolist() == list(range(slots.shape[1]))
        gone = [place for place in range(length) if place not in after.positions[row].tolist()]
        if gone:
            assert scores[row][gone].max() <= min(
                [float(scores[row][place]) for place in after.positions[row] if not state.extra[place]], default=9
            )


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (VimForImageClassification(VimConfig(**SMALL)), lambda key: key),
        (
            PlainMambaForImageClassification(
                PlainMambaConfig(**SMALL | {"image_size": 16, "patch_size": 4}, stem=2, local=True, official_pairing=True, double_dt_bias=True)
            ),
            lambda key: key.replace("head.", "head.fc.") if key.startswith("head.") else f"backbone.{key}",
        ),
    ],
    ids=["vim", "plainmamba"],
)  # fmt: skip
def test_official_files_open(network, names, tmp_path):
    """By their published names; the file says the shape, and no code in it runs."""
    network = network.eval()
    state = {names(key): value for key, value in network.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "official.pth")
    opened = read_official(tmp_path / "official.pth")
    assert {key: getattr(opened.config, key) for key in SMALL} == {key: getattr(network.config, key) for key in SMALL}
    batch = images(size=network.config.image_size).float()
    torch.testing.assert_close(opened(batch).logits, network(batch).logits, rtol=0, atol=0)
    some = dict(list(state.items())[:-1]) | {names("layers.0.norm.what"): torch.ones(1)}
    with pytest.raises(Problem, match=r"do not fit|have no"):
        from_official(some)
    with pytest.raises(Problem, match="neither Vim nor PlainMamba"):
        from_official({"a": torch.ones(1)})
    torch.save({"model": Path()}, tmp_path / "code.pth")
    with pytest.raises(Problem, match="cannot be opened"):
        read_official(tmp_path / "code.pth")


@pytest.mark.parametrize("kind", ["vim", "plainmamba"])
def test_folders_open_by_the_auto_class(kind, tmp_path):
    network = made(kind, reduction={"sites": [1], "keep": [0.5]}).float()
    network.save_pretrained(tmp_path)
    opened = AutoModelForImageClassification.from_pretrained(tmp_path)
    batch = images().float()
    found = opened(batch)
    assert found.positions.shape[1] < len(network.ranks)
    torch.testing.assert_close(found.logits, network(batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "score"), [("vim", "write"), ("vim", "delta"), ("plainmamba", "write")])
@torch.no_grad()
def test_what_a_patch_writes_is_its_own(kind, score):
    """Not that of the patch mirrored to it, as where the backward branch is left in its own order; with filters of one tap nothing leaks."""
    network, batch = made(kind), torch.zeros(4, 3, 10, 10, dtype=torch.float64)
    mixer = network.layers[0].mixer if kind == "vim" else network.layers[0].mamba
    for conv in (mixer.conv1d, mixer.conv1d_b) if kind == "vim" else (mixer.conv2d,):
        taps = conv.weight.data
        middle = taps[..., -1:].clone() if kind == "vim" else taps[..., 1:2, 1:2].clone()
        taps.zero_()
        (taps[..., -1:] if kind == "vim" else taps[..., 1:2, 1:2]).copy_(middle)
    patches, reduction, found = Patches.all_of(4, network.ranks, tokens_outside(network)), PatchReduction(score=score), []
    for strength in (0.0, 3.0):
        for row, cell in enumerate((1, 7, 18, 23)):
            top, left = 2 * (cell // 5), 2 * (cell % 5)
            batch[row, :, top : top + 2, left : left + 2] = strength
        found.append(reduction.scores(network.layers[0](network.embed(batch), patches, None, watch=True)[1], 0))
    changed = found[1] != found[0]
    changed = changed if network.extra is None else torch.cat([changed[:, : network.extra], changed[:, network.extra + 1 :]], 1)
    assert [row.nonzero().flatten().tolist() for row in changed] == [[1], [7], [18], [23]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [{"score": "write"}, {"score": "clip"}, {"score": "delta"}, {"mass": 0.6}, {"kind": "merge"}], ids=str
)
@torch.no_grad()
def test_batch_mates_and_their_order_change_nothing(kind, settings):
    network, batch = made(kind), images(4)
    network.config.reduction = {"sites": [0, 1], "keep": [0.6]} | settings
    together, turned = network(batch), network(batch.flip(0))
    for row in range(4):
        alone = network(batch[row : row + 1])
        kept = alone.positions.shape[1]
        assert torch.equal(together.positions[row, :kept], alone.positions[0])
        for other in (alone.logits[0], turned.logits[3 - row]):
            torch.testing.assert_close(together.logits[row], other, rtol=1e-10, atol=1e-10)


def test_merging_keeps_sums_and_order():
    network, batch = made("vim"), images()
    network.config.reduction = {"kind": "merge", "sites": [0, 1], "keep": [0.6]}
    kept = {}
    real = PatchReduction.leave
    try:
        PatchReduction.leave = lambda self, hidden, *rest: kept.setdefault(len(kept), (hidden, real(self, hidden, *rest)))[1]
        found = network(batch)
    finally:
        PatchReduction.leave = real
    for before, (after, patches) in kept.values():
        sizes = torch.ones(before.shape[:2]) if before.shape[1] == 26 else kept[0][1][1].sizes
        torch.testing.assert_close(
            (after * patches.sizes[..., None]).sum(1), (before * sizes[..., None]).sum(1), rtol=1e-5, atol=1e-5
        )
        assert (patches.sizes.sum(1) == 26).all()
        assert (patches.positions[:, 1:] > patches.positions[:, :-1]).all()
        assert ((patches.positions == network.extra).sum(1) == 1).all()
    assert found.representative.shape == (3, 25)


def test_what_does_not_fit_is_said():
    network, batch = made("vim"), images()
    for reduction, words in (
        ({"sites": [3]}, "Patches cannot leave after layer 3 of 4"),
        ({"sites": [0, 1], "keep": [0.5, 0.5, 0.5]}, "3 shares do not fit 2 sites"),
    ):
        network.config.reduction = reduction
        with pytest.raises(Problem, match=words):
            network(batch)
    for wrong in ({"keep": [0]}, {"keep": [1.2]}, {"sites": [2, 1]}, {"kind": "merge", "keep": [0.3]}):
        with pytest.raises(ValidationError):
            PatchReduction.model_validate(wrong)
    with pytest.raises(Problem, match=r"Patches of 3 pixels do not fill an image of 10") as found:
        VimForImageClassification(VimConfig(**SMALL | {"patch_size": 3}))
    assert "9 or 12" in str(found.value.fix)
    network.config.reduction = None
    with pytest.raises(Problem, match="Images of 3x8x8 do not fit a model of 3x10x10"):
        network(batch[:, :, :8, :8])
    network.layers[1].mixer.D.data[0] = torch.nan
    network.config.reduction = {"sites": [1], "score": "clip"}
    with pytest.raises(Problem, match="importance after layer 1 is not finite"):
        network(batch)


def test_published_costs_and_schedules():
    for width, giga in ((192, 1.53), (384, 5.32), (768, 19.7)):
        with torch.device("meta"):
            counted = patch_costs(VimForImageClassification(VimConfig(hidden_size=width)))
        assert sum(counted.by_layer(197, {})) / 1e9 == pytest.approx(giga, rel=0.005)
    assert token_fraction(24, {9: 0.8, 19: 0.8}) == pytest.approx(0.857, abs=5e-4)
    assert token_fraction(24, {4: 0.8, 9: 0.8, 14: 0.8}) == pytest.approx(0.700, abs=5e-3)
    assert [kept_count(count, 0.8) for count in (196, 157, 126)] == [157, 126, 101]
