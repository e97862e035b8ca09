"""The law of mutated masks by enumeration, and what the printed algorithm does instead."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.search.mutate import mutate_mask


def test_every_allowed_subset_is_equally_likely():
    generator, parent, draws = torch.Generator().manual_seed(0), torch.tensor([0, 2, 3, 5, 7]), 10_000
    allowed = {s for s in combinations(range(8), 4) if len({0, 2, 3, 5, 7} & set(s)) >= 3}
    assert len(allowed) == 35
    found = Counter(tuple(mutate_mask(parent, 8, 4, 0.75, generator).tolist()) for _ in range(draws))
    assert set(found) == allowed
    expected = draws / len(allowed)
    chi_squared = sum((found[s] - expected) ** 2 / expected for s in allowed)
    assert chi_squared < 65.2, "the 0.999 quantile of 34 degrees of freedom"


@given(st.integers(1, 60), st.floats(0.02, 1), st.floats(0.02, 1), st.floats(0, 1), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_size_and_overlap_always_hold(length, share, wanted, similarity, seed):
    generator = torch.Generator().manual_seed(seed)
    parent = torch.randperm(length, generator=generator)[: max(1, round(share * length))].sort().values
    count = max(1, round(wanted * length))
    child = mutate_mask(parent, length, count, similarity, generator)
    assert len(child) == count == len(set(child.tolist()))
    assert child.tolist() == sorted(child.tolist())
    assert 0 <= int(child.min()) <= int(child.max()) < length
    assert len(set(child.tolist()) & set(parent.tolist())) >= similarity * min(len(parent), count) - 1e-6


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 1.0])
def test_wide_layers_never_fail(share):
    generator, length = torch.Generator().manual_seed(1), 11008
    count = round(share * length)
    parent = torch.randperm(length, generator=generator)[:count].sort().values
    child = mutate_mask(parent, length, count, 0.8, generator)
    assert len(child) == count
    assert len(set(child.tolist()) & set(parent.tolist())) >= 0.8 * count


def as_printed(parent, length, count, similarity, generator, tries=1000):
    """Algorithm 1 to the letter: the overlap is compared with a share of the mask's whole length."""
    for _ in range(tries):
        drawn = torch.randperm(length, generator=generator)[:count]
        if len(set(drawn.tolist()) & set(parent.tolist())) >= similarity * length:
            return drawn
    return parent


def test_the_printed_algorithm_returns_the_wrong_size():
    generator = torch.Generator().manual_seed(2)
    parent = torch.arange(128)[:115]
    assert len(as_printed(parent, 128, 90, 0.8, generator)) == 115
    assert len(mutate_mask(parent, 128, 90, 0.8, generator)) == 90
