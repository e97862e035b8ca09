"""The golden fixture of the multi-weight sheet: a 4 × 12 problem whose every figure is known to ten digits."""

import math

import pytest
import torch

from duramen.prune import magnitude, multiweight, sparsegpt, wanda
from duramen.prune.compensate import compensate
from duramen.prune.factor import factorise
from duramen.prune.reconstruct import reconstruct
from oracles import dense

N, INPUTS, OUTPUTS = 40, 12, 4
X = torch.tensor(
    [
        [(1 + j % 3) * (math.sin(0.37 * (j + 1) * (t + 1)) + 0.8 * math.cos(0.11 * (t + 1) ** 2) + 0.3 * math.cos(1.7 * (j + 1) + 0.9 * t))
         for t in range(N)]
        for j in range(INPUTS)
    ],
    dtype=torch.float64,
)  # fmt: skip
GRAM = X @ X.T / N
WEIGHT = torch.tensor(
    [[math.sin(1 + 3 * i + 1.3 * j + 0.7 * (i + 1) * j * j) for j in range(INPUTS)] for i in range(OUTPUTS)],
    dtype=torch.float64,
)
HESSIAN = dense.damped(GRAM, 0.01)
WHOLE = dense.loss(WEIGHT, HESSIAN)
CHECKERED = torch.tensor([[(i + j) % 2 == 0 for j in range(INPUTS)] for i in range(OUTPUTS)])


def relative(weight):
    return dense.loss(weight - WEIGHT, HESSIAN) / WHOLE


def exact(mask):
    return relative(reconstruct(WEIGHT, GRAM, mask, damping=0.01).weight)


def close(value):
    return pytest.approx(value, abs=1e-9)


def test_the_fixture_is_the_sheets():
    assert (HESSIAN - GRAM)[0, 0].item() == pytest.approx(0.0420405442, abs=1e-10)
    assert HESSIAN[0, 0].item() == pytest.approx(0.8694393021, abs=1e-10)
    assert GRAM.trace().item() == pytest.approx(50.4486529853, abs=1e-9)
    assert pytest.approx(117.9210097036, abs=1e-9) == WHOLE
    assert WEIGHT[3, 11].item() == pytest.approx(-0.9698824689, abs=1e-10)


@pytest.mark.parametrize(
    ("width", "expected"), [(1, 0.4678442685), (2, 0.4396560979), (4, 0.4624723840), (6, 0.3460919996), (12, 0.2261972849)]
)
def test_compensation_of_a_given_mask(width, expected):
    factor = factorise(GRAM, 0.01, dtype=torch.float64)
    edited, loss = compensate(WEIGHT, CHECKERED, factor, width)
    assert relative(edited) == close(expected)
    assert 2 * float(loss.sum()) / WHOLE == close(expected), "the losses of the blocks must telescope"


def test_exact_reconstruction_of_a_given_mask():
    found = reconstruct(WEIGHT, GRAM, CHECKERED, damping=0.01)
    delta = found.weight - WEIGHT
    per_row = ((delta @ HESSIAN) * delta).sum(1) / ((WEIGHT @ HESSIAN) * WEIGHT).sum(1)
    assert relative(found.weight) == close(0.2261972849)
    assert per_row.tolist() == [close(value) for value in (0.3908098015, 0.2077168068, 0.3058112176, 0.1843503123)]
    assert relative(WEIGHT.masked_fill(CHECKERED, 0)) == close(0.4378484919)


@pytest.mark.parametrize(
    ("prune", "settings", "expected", "then_exact"),
    [
        (magnitude.prune, {"sparsity": 0.5, "scope": "row"}, 0.2214751403, 0.0863191933),
        (wanda.prune, {"sparsity": 0.5}, 0.0720851483, 0.0290249084),
        (wanda.prune, {"pattern": "2:4"}, 0.0579441888, 0.0313014797),
        (
            multiweight.prune,
            {"sparsity": 0.5, "mask": "single", "block": "all", "compensation": "block"},
            0.0633920691,
            0.0633920691,
        ),
        (sparsegpt.prune, {"sparsity": 0.5, "block": 12}, 0.0369252731, 0.0304105311),
        (sparsegpt.prune, {"sparsity": 0.5, "block": 4}, 0.0358001054, 0.0306619839),
        (sparsegpt.prune, {"pattern": "2:4"}, 0.0539501001, 0.0297169602),
        (
            multiweight.prune,
            {"sparsity": 0.5, "mask": "single", "block": 4, "compensation": "block"},
            0.0336864572,
            0.0304986798,
        ),
        (
            multiweight.prune,
            {"pattern": "2:4", "block": 4, "mask": "single", "compensation": "block"},
            0.0442507722,
            0.0315902822,
        ),
        (
            multiweight.prune,
            {"pattern": "2:4", "block": 4, "mask": "joint", "compensation": "block"},
            0.0442507722,
            0.0315902822,
        ),
        (
            multiweight.prune,
            {"pattern": "2:4", "block": 12, "mask": "single", "compensation": "block"},
            0.0432486283,
            0.0432486283,
        ),
    ],
)
def test_every_method(prune, settings, expected, then_exact):
    found = prune(WEIGHT, GRAM, **settings)
    assert relative(found.weight) == close(expected)
    assert exact(found.pruned) == close(then_exact)
    assert found.error == pytest.approx(dense.loss(found.weight - WEIGHT, GRAM), rel=1e-12)


@pytest.mark.parametrize(
    ("masks", "expected", "first_rows"),
    [
        (
            dense.all_masks(12, 6),
            0.0221752544,
            [{1, 2, 5, 6, 8, 9}, {1, 4, 6, 7, 9, 10}, {0, 6, 8, 9, 10, 11}, {0, 3, 6, 7, 9, 10}],
        ),
        (dense.pattern_masks(12, 2, 4), 0.0245479533, None),
    ],
)
def test_brute_force_optimum(masks, expected, first_rows):
    best = [dense.best_mask(row, HESSIAN, masks) for row in WEIGHT]
    assert sum(loss for _, loss in best) / WHOLE == close(expected)
    if first_rows:
        found = [set(mask.nonzero()[:, 0].tolist()) for mask, _ in best]
        assert found in (first_rows, [set(range(12)) - row for row in first_rows])
    chosen = torch.stack([mask for mask, _ in best])
    assert exact(chosen) == close(expected), "our solver must reach the optimum on the optimal mask"
