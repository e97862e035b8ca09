"""Allocation: totals are exact, curves are spent where they rise least, outliers keep more."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import tiny
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.prune import multiweight, sparsegpt
from duramen.prune.allocation import Survey, allocate, curve, owl, points, round_to_total


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(10, 5000), st.floats(0.3, 0.7)), min_size=1, max_size=20))
def test_counts_add_up_to_the_total(layers):
    sizes = {str(number): size for number, (size, _) in enumerate(layers)}
    shares = {str(number): share for number, (_, share) in enumerate(layers)}
    total = round(sum(sizes[name] * shares[name] for name in sizes))
    counts = round_to_total(shares, sizes, total)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - shares[name] * sizes[name]) <= 1 for name in sizes)


def test_curves_are_spent_where_they_rise_least():
    """Against every split of a coarse grid, for convex curves of equal and of different sizes."""
    places = points(0.5)
    steep = Survey("steep", 0, 100, errors=tuple(9 * x**3 for x in places))
    flat = Survey("flat", 1, 300, errors=tuple(x**3 for x in places))
    found = curve([steep, flat], 0.5)
    assert 100 * found["steep"] + 300 * found["flat"] == pytest.approx(200)

    def cost(a, b):
        return sum(torch.as_tensor(s.errors)[places.index(x)] for s, x in ((steep, a), (flat, b)))

    affordable = [pair for pair in itertools.product(places, places) if 100 * pair[0] + 300 * pair[1] >= 200 - 1e-9]
    best = min(affordable, key=lambda pair: cost(*pair))
    assert found["steep"] == pytest.approx(best[0], abs=0.051)
    assert found["flat"] > found["steep"]


def test_outliers_keep_more():
    surveys = [Survey(f"l{block}", block, 100, outliers=0.01 * block) for block in range(5)]
    shares = owl(surveys, 0.7)
    assert sorted(shares.values(), reverse=True) == list(shares.values())
    assert max(shares.values()) - min(shares.values()) == pytest.approx(0.16)
    assert sum(shares.values()) / 5 == pytest.approx(0.7)
    assert owl([Survey("a", 0, 3, 0.1), Survey("b", 1, 3, 0.1)], 0.7) == {"a": 0.7, "b": 0.7}


@pytest.mark.parametrize("allocation", ["owl", "curve"])
@pytest.mark.parametrize(("method", "options"), [(multiweight, {"damping": "held-out"}), (sparsegpt, {"damping": 0.01})])
def test_a_model_loses_exactly_the_global_share(allocation, method, options):
    records = method.apply(tiny.model("llama"), tiny.ids(8, 24), sparsity=0.63, allocation=allocation, **options)
    removed, size = (sum(record[key] for record in records) for key in ("removed", "size"))
    assert removed == round(0.63 * size)
    assert len({round(record["removed"] / record["size"], 3) for record in records}) > 1


def test_the_dense_model_is_surveyed():
    """The shares come from the dense model, so they do not depend on what the walk edits afterwards."""
    seen = []
    for method in (sparsegpt, multiweight):
        records = method.apply(tiny.model("llama"), tiny.ids(8, 24), sparsity=0.6, allocation="owl", damping=0.01)
        seen.append([record["removed"] for record in records])
    assert seen[0] == seen[1]
    model = BlockModel.from_module(tiny.model("llama"))
    weights = {name: parameter.clone() for name, parameter in model.network.named_parameters()}
    from duramen.calibrate.walker import Walk
    from duramen.prune.model import _shares

    names = list(model.layer_names())
    _shares(sparsegpt.prune, model, tiny.ids(), sparsegpt.Settings(sparsity=0.6, allocation="curve"), names, Walk())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.network.named_parameters())


@pytest.mark.parametrize("target", [{"pattern": "2:4"}, {"sparsity": (0.4, 0.6)}])
def test_an_allocation_needs_one_share(target):
    with pytest.raises((Problem, ValidationError), match="needs one share"):
        multiweight.Settings(allocation="owl", **target)


def test_a_single_layer_gets_the_whole_share():
    record = {"name": "a", "block": 0, "size": 1000, "errors": [0.1 * x for x in range(7)]}
    assert allocate([record], 0.5, "curve") == {"a": 0.5}


def test_layers_at_their_limit_pass_the_rest_on():
    sizes = {"a": 100, "b": 100, "c": 100}
    assert sum(round_to_total({"a": 1.1, "b": 0.9, "c": 0.85}, sizes, 285).values()) == 285
    assert sum(round_to_total({"a": -0.1, "b": 0.1, "c": 0.15}, sizes, 15).values()) == 15


def test_the_effort_decides_what_is_left_open():
    spread = lambda **settings: multiweight.Settings(**settings).spread  # noqa: E731
    assert spread(sparsity=0.5) == "uniform"
    assert spread(sparsity=0.5, effort="best") == "owl"
    assert spread(sparsity=0.5, effort="best", allocation="curve") == "curve"
    assert spread(pattern="2:4", effort="best") == "uniform"
    assert spread(sparsity=(0.4, 0.6), effort="best") == "uniform"


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.97])
def test_outliers_leave_every_block_something(share):
    surveys = [Survey(f"b{block}", block, 1000, 0.0 if not block else 1.0, ()) for block in range(10)]
    found = owl(surveys, share)
    assert min(found.values()) >= 0
    assert max(found.values()) < 1
