"""Token reduction in whole models: nothing leaves and nothing changes; rows do not matter to each other; likelihood and generation go on from what is left."""

import pytest
import torch

import tiny
from duramen.override import override
from duramen.problem import Problem
from duramen.ssm.mixer import ExactScans, find_mixers
from duramen.ssm.ssd import ssd_scan
from duramen.tokens.model import Reduced, Reduction, continuation_losses
from duramen.tokens.schedule import kept_count

NAMES = ("mamba", "mamba2", "falcon_mamba")
HYBRIDS = ("jamba", "bamba", "zamba2", "nemotron_h")
KINDS = ("utrc", "tome", "prune", "random", "truncate")
CLOSE = {"rtol": 1e-4, "atol": 5e-5}


def some(name="mamba2", **more):
    return Reduction(**{"kind": "utrc", "cut": 0.3, "sites": (0,) if name in HYBRIDS else (0, 1), **more})


@pytest.mark.parametrize("name", NAMES + HYBRIDS)
@torch.no_grad()
def test_where_nothing_leaves_nothing_changes(name):
    network, tokens = tiny.model(name), tiny.ids(2, 30)
    stock = network(tokens).logits
    reduced = Reduced(network, Reduction(cut=0.0, sites=(0,)))
    found = network(tokens).logits
    torch.testing.assert_close(found, stock, **CLOSE)
    assert reduced.prompt.positions.tolist() == [list(range(30))] * 2
    reduced.remove()
    assert torch.equal(network(tokens).logits, stock)
    with ExactScans(network):
        assert torch.equal(network(tokens).logits, found), "on the same scans bit for bit"


@torch.no_grad()
def test_of_a_prompt_that_is_all_protected_nothing_leaves():
    network, tokens = tiny.model("mamba2"), tiny.ids(2, 5)
    with Reduced(network, some()) as reduced:
        found = network(tokens).logits
        assert reduced.prompt.positions.tolist() == [list(range(5))] * 2
        with pytest.raises(Problem, match="already"):
            Reduced(network, some())
    with ExactScans(network):
        assert torch.equal(network(tokens).logits, found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_as_many_leave_as_the_schedule_says_and_protected_ones_stay(name, kind):
    network, tokens = tiny.model(name), tiny.ids(3, 40)
    with Reduced(network, some(name, kind=kind, merge_forward=False)) as reduced:
        logits = network(tokens).logits
    left = kept_count(kept_count(40, reduced.keep[0]), reduced.keep[1])
    assert logits.shape[1] == left < 40
    assert reduced.prompt.valid.all()
    for kept in reduced.prompt.kept:
        places = kept.positions.tolist()
        assert places == sorted(places)
        assert {0, 36, 37, 38, 39} <= set(places)
        assert kept.sizes.sum() == 40
    assert torch.isfinite(logits).all()
    if kind == "truncate":
        assert reduced.prompt.kept[0].positions[1:].tolist() == list(range(41 - left, 40))


@pytest.mark.parametrize("name", NAMES + HYBRIDS)
@pytest.mark.parametrize(
    "more", [{}, {"gap_step": "bias"}, {"gap_step": "mean", "aligned": True}, {"kind": "prune", "score": "clip"}]
)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_mates(name, more, side):
    """Padded in a batch or alone: the same tokens stay, and their logits agree."""
    network, prompts = tiny.model(name), [tiny.ids(1, 21)[0], tiny.ids(1, 33)[0]]
    tokens, mask = torch.zeros(2, 33, dtype=torch.long), torch.zeros(2, 33, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(33 - len(prompt), 33)
        tokens[row, place], mask[row, place] = prompt, 1
    with Reduced(network, some(name, **more)) as reduced:
        together = network(tokens, attention_mask=mask).logits
        kept, valid = reduced.prompt.kept, reduced.prompt.valid
        for row, prompt in enumerate(prompts):
            alone = network(prompt[None]).logits[0]
            assert reduced.prompt.kept[0].positions.tolist() == kept[row].positions.tolist()
            torch.testing.assert_close(together[row][valid[row]], alone, **CLOSE)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "utrc") for name in NAMES + HYBRIDS), *(("mamba2", kind) for kind in KINDS[1:])]
)
@torch.no_grad()
def test_generation_goes_on_from_what_is_left(name, kind):
    """Reduced prompt and cached steps, against one pass over prompt and continuation with the latter protected."""
    network, tokens = tiny.model(name), tiny.ids(2, 30)
    with Reduced(network, some(name, kind=kind)) as reduced:
        out = network(tokens, use_cache=True)
        logits, whole = [out.logits[:, -1]], tokens
        for _ in range(5):
            following = logits[-1].argmax(-1, keepdim=True)
            whole = torch.cat([whole, following], 1)
            out = network(following, use_cache=True, cache=out.cache)
            logits.append(out.logits[:, -1])
        cached = torch.stack(logits[:-1], 1).log_softmax(-1).gather(2, whole[:, 30:, None])[..., 0]
        torch.testing.assert_close(-continuation_losses(network, reduced, whole, 30), cached, **CLOSE)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
        assert torch.equal(network.generate(tokens, **options), whole)


@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_later_layers_see_what_is_left_at_the_places_that_it_had(name):
    """Against the stock model whose first block is made to give the tokens that are left, told where they were."""
    network, tokens = tiny.model(name), tiny.ids(1, 30)
    seen = {}
    first = network.model.layers[0]
    handle = first.register_forward_hook(lambda module, args, out: seen.update(out=out))
    network(tokens)
    handle.remove()
    with Reduced(network, some(name, kind="prune")) as reduced:
        found = network(tokens).logits
        kept = reduced.prompt.positions
    assert kept.shape[1] < 30
    whole = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    left = whole[:, kept[0]]
    undo = override(first, lambda *_, **__: (left, None) if isinstance(seen["out"], tuple) else left)
    embedded = network.get_input_embeddings()(tokens[:, kept[0]])
    expected = network(inputs_embeds=embedded, position_ids=kept, attention_mask=torch.ones_like(kept)).logits
    undo()
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_a_likelihood_without_reduction_is_the_dense_one_and_a_prompt_never_sees_what_follows():
    network, tokens = tiny.model("mamba2"), tiny.ids(2, 30)
    dense = torch.nn.functional.cross_entropy(
        network(tokens).logits[:, 19:-1].flatten(0, 1), tokens[:, 20:].flatten(), reduction="none"
    )
    with Reduced(network, Reduction(cut=0.0, sites=(0,))) as reduced:
        torch.testing.assert_close(continuation_losses(network, reduced, tokens, 20).flatten(), dense, **CLOSE)
    other = tokens.clone()
    other[:, 25:] = (other[:, 25:] + 1) % 250
    with Reduced(network, some()) as reduced:
        first = continuation_losses(network, reduced, tokens, 20)
        kept = [each.positions[each.positions < 20].tolist() for each in reduced.prompt.kept]
        second = continuation_losses(network, reduced, other, 20)
        assert kept == [each.positions[each.positions < 20].tolist() for each in reduced.prompt.kept]
        torch.testing.assert_close(first[:, :5], second[:, :5], **CLOSE)
        assert len(kept[0]) < 20


@torch.no_grad()
def test_tokens_that_neither_write_nor_decay_leave_first_and_leave_no_trace(monkeypatch):
    """Some tokens get no step in any layer, and convolutions see no neighbours; then what is left has the logits that it had."""
    network, tokens, places = tiny.model("mamba2"), tiny.ids(1, 40), {"now": torch.arange(40)}
    quiet = torch.isin(tokens[0], tokens[0, 5:30:2]).nonzero().flatten()
    for name in find_mixers(network):
        network.get_submodule(name).conv1d.weight[:, :, :-1] = 0

    def hushed(x, decays, steps, *args, **kwargs):
        steps.mul_(~torch.isin(places["now"][: x.shape[1]], quiet).view(1, -1, 1))
        return ssd_scan(x, steps, steps, *args, **kwargs)

    monkeypatch.setattr("duramen.ssm.mixer.ssd_scan", hushed)
    with ExactScans(network):
        whole = network(tokens).logits
    with Reduced(network, Reduction(kind="prune", cut=0.1, sites=(0,))) as reduced:
        shorten = reduced._shorten

        def noted(*args):
            out = shorten(*args)
            places["now"] = reduced.prompt.kept[0].positions
            return out

        monkeypatch.setattr(reduced, "_shorten", noted)
        found, left = network(tokens).logits, reduced.prompt.kept[0].positions
    gone = set(range(40)) - set(left.tolist())
    assert gone
    assert gone <= set(quiet.tolist())
    torch.testing.assert_close(found[0], whole[0, left], **CLOSE)


@pytest.mark.parametrize(
    ("name", "reduction", "words"),
    [
        ("llama", {}, "no state-space layers"),
        ("jamba", {"sites": (1,)}, "after layer 1, which is no state-space layer"),
        ("mamba", {"sites": (7,)}, "after layer 7"),
        ("mamba", {"sites": (2,), "cut": 0.5}, "cannot be cut"),
        ("mamba", {"sites": (), "cut": 0.99}, "cannot be cut"),
    ],
)
def test_what_cannot_be_is_refused(name, reduction, words):
    with pytest.raises(Problem, match=words):
        Reduced(tiny.model(name), Reduction(**reduction))
