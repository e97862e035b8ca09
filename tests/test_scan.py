"""The scans against the recurrences as printed; gaps folded against zeros in their places; convolution with holes; gradients; padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.ssm import fold, selective
from duramen.ssm.conv import aligned_conv, causal_conv
from duramen.ssm.selective import selective_scan
from duramen.ssm.ssd import ssd_scan
from oracles import scan as oracle

KINDS = ("selective", "ssd")


def problem(kind, steps, batch=2, seed=0):
    """Random inputs of a scan, with a state: x, Δ̃, Δ, A, B, C, h."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    if kind == "selective":
        shape, a, vectors, state = (batch, steps, 5), normal(5, 3), (batch, steps, 3), normal(batch, 5, 3)
        deltas = shape
    else:
        shape, a, vectors, state = (batch, steps, 4, 3), normal(4), (batch, steps, 2, 5), normal(batch, 4, 3, 5)
        deltas = shape[:3]
    decay, write = (torch.nn.functional.softplus(normal(*deltas)) for _ in range(2))
    return normal(*shape), decay, write, -a.exp(), normal(*vectors), normal(*vectors), state


def run(kind, x, decay, write, a, b, c, state=None, **more):
    return (selective_scan if kind == "selective" else ssd_scan)(x, decay, write, a, b, c, initial_state=state, **more)


def reference(kind, *args):
    return getattr(oracle, kind)(*args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 15, 16, 17, 64, 70])
@pytest.mark.parametrize("with_state", [False, True])
def test_the_recurrence(kind, steps, with_state):
    *args, state = problem(kind, steps)
    state = state if with_state else None
    for chunk in ({}, {"chunk": 1}, {"chunk": 7}) if kind == "ssd" else ({},):
        for found, expected in zip(run(kind, *args, state, **chunk), reference(kind, *args, state), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    single = [each.float() for each in args]
    for found, expected in zip(run(kind, *single), reference(kind, *args), strict=True):
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_split_anywhere_with_the_state_carried_it_is_the_whole(kind):
    x, decay, write, a, b, c, state = problem(kind, 23)
    skip = torch.randn(x.shape[2], dtype=torch.float64)
    whole, last = run(kind, x, decay, write, a, b, c, state, skip=skip)
    for cut in range(1, 23):
        first, middle = run(kind, x[:, :cut], decay[:, :cut], write[:, :cut], a, b[:, :cut], c[:, :cut], state, skip=skip)
        second, end = run(kind, x[:, cut:], decay[:, cut:], write[:, cut:], a, b[:, cut:], c[:, cut:], middle, skip=skip)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_holds(kind, side):
    x, decay, write, a, b, c, state = problem(kind, 20, batch=1)
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[:, :6] = side == "right"
    valid[:, -6:] = side == "left"
    alone = run(kind, *(each[:, valid[0]] for each in (x, decay, write)), a, b[:, valid[0]], c[:, valid[0]], state)
    padded = run(kind, x, decay, write, a, b, c, state, valid=valid)
    torch.testing.assert_close(padded[0][:, valid[0]], alone[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded[1], alone[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 5, 37])
def test_gradients_are_those_of_the_printed_recurrence(kind, steps):
    args = [each.requires_grad_() for each in problem(kind, steps)]
    draw = torch.Generator().manual_seed(9)
    found, expected = [], []
    for function, into in ((run, found), (reference, expected)):
        y, h = function(kind, *args)
        upstream = [torch.randn(each.shape, generator=draw.manual_seed(3), dtype=torch.float64) for each in (y, h)]
        into += torch.autograd.grad([y, h], args, upstream)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12 * max(1, float(other.abs().max()))


def test_gradients_of_a_step_from_rest():
    x, decay, write, a, b, c, _ = (each.requires_grad_() for each in problem("selective", 19))
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args)[0].sum(), (x, decay, write, a, b, c))


def test_a_hundred_thousand_steps_do_not_overflow():
    x, _, write, a, b, c, _ = problem("ssd", 300, batch=1)
    y, h = run("ssd", x.float(), 300 + write.float(), write.float(), a.float(), b.float(), c.float())
    assert torch.isfinite(y).all()
    assert torch.isfinite(h).all()


@st.composite
def kept_of(draw):
    length = draw(st.integers(1, 30))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    mask[draw(st.integers(0, length - 1))] = True
    return mask


@pytest.mark.parametrize("kind", KINDS)
@given(kept=kept_of(), seed=st.integers(0, 1000), along=st.sampled_from(["forward", "backward", "random"]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_folded_gaps_are_zeros_in_their_places(kind, kept, seed, along):
    """Any removed steps, the first and the last too, along any path, from any state; in both forms."""
    x, steps, _, a, b, c, state = problem(kind, len(kept), batch=1, seed=seed)
    path = {
        "forward": torch.arange(len(kept)),
        "backward": torch.arange(len(kept)).flip(0),
        "random": torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)),
    }[along]
    kept, x, steps, b, c = kept[path], x[:, path], steps[:, path], b[:, path], c[:, path]
    silent = x * kept.view(1, -1, *[1] * (x.ndim - 2))
    expected, last = reference(kind, silent, steps, steps, a, b, c, state)
    places = kept.nonzero().T
    packed = [each[:, kept] for each in (x, steps, b, c)]
    decays = fold.fold_own(steps, places)
    gap, tail = fold.gaps(places, len(kept))
    assert int(gap.sum() + tail.sum()) == int((~kept).sum())
    y, h = run(kind, packed[0], decays, packed[1], a, *packed[2:], state)
    torch.testing.assert_close(y, expected[:, kept], rtol=1e-12, atol=1e-12)
    behind = steps[:, int(places[0, -1]) + 1 :].sum(1)
    torch.testing.assert_close(fold.decay_state(h, behind, a), last, rtol=1e-11, atol=1e-12)
    deltas = (packed[1], decays) if kind == "selective" else (packed[1][..., None], decays[..., None])
    rescaled = fold.rescale(packed[0], *deltas)
    once, _ = run(kind, rescaled, decays, decays, a, *packed[2:], state)
    torch.testing.assert_close(once, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_removed_step_would_have_had(kind):
    _, _, write, *_ = problem(kind, 5)
    places = torch.tensor([[0, 1, 4, 5, 9], [2, 3, 4, 8, 9]])
    gap, tail = fold.gaps(places, 12)
    assert gap.tolist() == [[0, 0, 2, 0, 3], [2, 0, 0, 3, 0]]
    assert tail.tolist() == [2, 2]
    assert torch.equal(fold.fold(write, gap, fold.removed_steps("hold", write)), write)
    bias = torch.randn(write.shape[2:], dtype=torch.float64)
    found = fold.fold(write, gap, fold.removed_steps("bias", write, bias))
    torch.testing.assert_close(found[0, 4], write[0, 4] + 3 * torch.nn.functional.softplus(bias))
    assert torch.equal(fold.fold(write, gap, fold.removed_steps("previous", write))[1, 0], write[1, 0]), "none before it"
    torch.testing.assert_close(
        fold.fold(write, gap, fold.removed_steps("previous", write))[0, 2], write[0, 2] + 2 * write[0, 1]
    )
    torch.testing.assert_close(fold.fold(write, gap, fold.removed_steps("next", write))[0, 2], 3 * write[0, 2])
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    mean = fold.removed_steps("mean", write, valid=valid)
    torch.testing.assert_close(mean[1, 0], write[1, :3].mean(0))
    nothing = torch.zeros(1, 3, 2, dtype=torch.float64)
    assert torch.equal(fold.rescale(torch.ones(1, 3, 2, dtype=torch.float64), nothing, nothing), nothing), "not 0/0"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_neither_write_nor_decay_may_go_unless_their_gap_decays(kind):
    x, steps, _, a, b, c, state = problem(kind, 12, batch=1)
    kept = torch.tensor([True, False, True, True, False, False, True, True, True, False, True, True])
    steps[:, ~kept] = torch.nn.functional.softplus(torch.tensor(-40.0, dtype=torch.float64))
    whole, last = run(kind, x, steps, steps, a, b, c, state)
    packed = [each[:, kept] for each in (x, steps, b, c)]
    gap, _ = fold.gaps(kept.nonzero().T, 12)
    for decays in (packed[1], fold.fold_own(steps, kept.nonzero().T)):
        y, h = run(kind, packed[0], decays, packed[1], a, *packed[2:], state)
        torch.testing.assert_close(y, whole[:, kept], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(h, last, rtol=1e-7, atol=1e-7)
    decays = fold.fold(packed[1], gap, fold.removed_steps("bias", packed[1], torch.zeros(steps.shape[2:], dtype=torch.float64)))
    assert (run(kind, packed[0], decays, packed[1], a, *packed[2:], state)[0] - whole[:, kept]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_removing_a_token_takes_its_write_away_and_nothing_else(kind):
    x, steps, _, a, b, c, state = problem(kind, 9, batch=1)
    whole, _ = run(kind, x, steps, steps, a, b, c, state)
    for gone in range(9):
        kept = torch.arange(9) != gone
        packed = [each[:, kept] for each in (x, steps, b, c)]
        y, _ = run(kind, packed[0], fold.fold_own(steps, kept.nonzero().T), packed[1], a, *packed[2:], state)
        alone = torch.zeros_like(x)
        alone[:, gone] = x[:, gone]
        lost, _ = reference(kind, alone, steps, steps, a, b, c)
        torch.testing.assert_close(whole[:, kept] - y, lost[:, kept], rtol=1e-11, atol=1e-12)


@given(kept=kept_of(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_aligned_convolution_sees_zeros_where_tokens_went(kept, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, len(kept), 3, generator=draw, dtype=torch.float64)
    weight, bias = torch.randn(3, 4, generator=draw, dtype=torch.float64), torch.randn(3, generator=draw, dtype=torch.float64)
    expected, _ = causal_conv(x * kept[:, None], weight, bias)
    found = aligned_conv(x[:, kept], weight, bias, kept.nonzero().T.expand(2, -1))
    torch.testing.assert_close(found, expected[:, kept], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_convolution_hands_on_the_last_inputs_that_count(side):
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((3, 10, 2), (2, 4)))
    initial = torch.randn(3, 3, 2, generator=draw, dtype=torch.float64)
    for count in (0, 1, 2, 5, 10):
        places = torch.arange(10)
        valid = (places < count if side == "right" else places >= 10 - count).expand(3, -1)
        first = None if side == "left" else initial
        y, last = causal_conv(x, weight, initial=first, valid=valid)
        alone = x[:, valid[0]]
        before = initial if side == "right" else torch.zeros_like(initial)
        if count:
            expected, _ = causal_conv(alone, weight, initial=before)
            torch.testing.assert_close(y[:, valid[0]], expected)
        if side == "right" or count >= 3:
            torch.testing.assert_close(last, torch.cat([before, alone], 1)[:, -3:])


def test_the_states_in_memory_are_those_of_one_chunk(monkeypatch):
    """Inference keeps no states but the last, training those at the borders of chunks."""
    shapes = []
    states = selective._states
    monkeypatch.setattr(selective, "_states", lambda *args: shapes.append(args[0].shape) or states(*args))
    *args, state = problem("selective", 100)
    selective_scan(*args, initial_state=state)
    assert max(shape[0] for shape in shapes) == selective.CHUNK
