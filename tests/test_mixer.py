"""State-space models of transformers on our scans: equal to the stock ones where those are right, and right where they are not."""

from inspect import signature

import pytest
import torch

import tiny
from duramen.ssm.mixer import ExactScans

NAMES = ("mamba", "falcon_mamba", "jamba", "mamba2", "bamba", "zamba2", "nemotron_h")
CLOSE = {"rtol": 1e-4, "atol": 5e-5}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_logits_are_those_of_the_stock_model_until_it_is_removed(name):
    network, tokens = tiny.model(name), tiny.ids(2, 37)
    stock = network(tokens).logits
    scans = ExactScans(network)
    assert len(scans.mixers) >= 1
    found = network(tokens).logits
    torch.testing.assert_close(found, stock, **CLOSE)
    assert not torch.equal(found, stock), "it ran on other scans"
    scans.remove()
    assert torch.equal(network(tokens).logits, stock)


def test_other_models_have_no_such_mixers():
    assert ExactScans(tiny.model("llama")).mixers == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_leaves_no_trace_in_what_is_generated(name, side):
    """Eight greedy steps after a padded prompt, against the prompt alone on the stock model without a cache."""
    network, prompts = tiny.model(name), [tiny.ids(1, 19)[0], tiny.ids(1, 30)[0]]
    tokens, mask = torch.zeros(2, 30, dtype=torch.long), torch.zeros(2, 30, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(30 - len(prompt), 30)
        tokens[row, place], mask[row, place] = prompt, 1
    alone = []
    for prompt in prompts:
        for _ in range(8):
            prompt = torch.cat([prompt, network(prompt[None], use_cache=False).logits[:, -1].argmax(-1)])
        alone.append(network(prompt[None, :-1], use_cache=False).logits[0, -8:])
    with ExactScans(network):
        found = continued(network, tokens, mask, 8)
    for row in range(2):
        torch.testing.assert_close(found[row], alone[row], rtol=1e-3, atol=2e-4)


def takes_places(network):
    """Whether positions can be given."""
    return "position_ids" in signature(network.forward).parameters


def continued(network, tokens, mask, steps):
    """Logits of the greedy steps after a prompt, [B, steps, V], by the cache; positions count the tokens that count."""
    places = (mask.cumsum(1) - 1).clamp_min(0)
    more = {"position_ids": places} if takes_places(network) else {}
    out = network(tokens, attention_mask=mask, use_cache=True, **more)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    logits = [out.logits[torch.arange(len(tokens)), last]]
    for _ in range(1, steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        following = {"position_ids": (mask.sum(1, keepdim=True) - 1)} if more else {}
        out = network(logits[-1].argmax(-1, keepdim=True), attention_mask=mask, use_cache=True, cache=out.cache, **following)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_prompt_in_pieces_is_the_whole_prompt(name):
    network, tokens = tiny.model(name), tiny.ids(2, 21)
    whole = network(tokens).logits
    with ExactScans(network):
        for cut in (1, 2, 3, 4, 11, 20):
            first = network(tokens[:, :cut], use_cache=True)
            places = {"position_ids": torch.arange(cut, 21).expand(2, -1)} if takes_places(network) else {}
            second = network(tokens[:, cut:], use_cache=True, cache=first.cache, **places)
            torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, **CLOSE)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba"])
def test_gradients_are_those_of_the_stock_model(name):
    network, tokens = tiny.model(name), tiny.ids(2, 21)
    found = []
    for exact in (False, True):
        scans = ExactScans(network) if exact else None
        network.zero_grad()
        network(tokens, labels=tokens).loss.backward()
        found.append(
            {path: parameter.grad.clone() for path, parameter in network.named_parameters() if parameter.grad is not None}
        )
    scans.remove()
    assert found[0].keys() == found[1].keys()
    for path, gradient in found[0].items():
        torch.testing.assert_close(found[1][path], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_generate_gives_the_same_tokens(name):
    network, tokens = tiny.model(name), tiny.ids(2, 12)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    stock = network.generate(tokens, **options)
    with ExactScans(network):
        assert torch.equal(network.generate(tokens, **options), stock)
