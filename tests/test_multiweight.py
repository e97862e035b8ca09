"""The seed method: its mask choices against enumeration, and the orderings that its mathematics promises."""

from functools import partial

import pytest
import torch

import tiny
from duramen.calibrate.statistics import Statistics
from duramen.problem import Problem
from duramen.prune import multiweight, sparsegpt, wanda
from duramen.prune.compensate import compensate
from duramen.prune.factor import factorise
from duramen.prune.layer import choose_damping
from duramen.prune.pattern import parse_pattern
from duramen.prune.reconstruct import output_error, reconstruct
from oracles import dense


def layer(outputs=16, inputs=64, seed=0):
    x = tiny.correlated(inputs, 6 * inputs, seed)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weight, x @ x.T


def damped_loss(weight, edited, gram, damping=0.01):
    return dense.loss(edited - weight, dense.damped(gram, damping))


@pytest.mark.parametrize(("kept", "group"), [(1, 4), (2, 4), (3, 4), (4, 8)])
def test_group_choice_is_the_enumerated_optimum(kept, group):
    """All 4, 6 or 70 removed sets of a group, each by a dense solve."""
    inverse = torch.linalg.inv(dense.damped(layer(inputs=group)[1], 0.01))
    weight = torch.randn(10, group, dtype=torch.float64)
    found = multiweight.group_mask(weight, inverse, parse_pattern(pattern=f"{kept}:{group}"))
    for row, mask in zip(weight, found, strict=True):
        losses = {
            tuple(candidate.tolist()): float(2 * multiweight.joint_loss(row, candidate, inverse))
            for candidate in dense.all_masks(group, group - kept)
        }
        assert min(losses, key=losses.get) == tuple(mask.tolist())


def test_reference_functions_agree_with_the_exact_solution():
    weight, gram = layer(1, 12)
    hessian = dense.damped(gram, 0.01)
    mask = torch.arange(12) % 3 == 0
    update = multiweight.joint_update(weight[0], mask, torch.linalg.inv(hessian))
    torch.testing.assert_close(weight[0] + update, dense.primal(weight, hessian, mask[None])[0])
    loss = multiweight.joint_loss(weight[0], mask, torch.linalg.inv(hessian))
    assert 2 * float(loss) == pytest.approx(float(update @ hessian @ update))


@pytest.mark.parametrize("seed", range(3))
def test_single_removals_in_any_order_end_at_the_joint_solution(seed):
    """Optimal brain surgeon with downdating, in a random order, is the multiple removal solution."""
    weight, gram = layer(1, 12, seed)
    hessian = dense.damped(gram, 0.01)
    gone = torch.randperm(12)[:5]
    row, inverse = weight[0].clone(), torch.linalg.inv(hessian)
    for entry in gone:
        row -= row[entry] / inverse[entry, entry] * inverse[entry]
        inverse = inverse - inverse[:, entry, None] * inverse[None, entry] / inverse[entry, entry]
        inverse[entry, entry] = 1
    mask = torch.zeros(12, dtype=torch.bool).index_fill(0, gone, True)
    torch.testing.assert_close(row.where(~mask, torch.zeros_like(row)), dense.primal(weight, hessian, mask[None])[0])


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}])
@pytest.mark.parametrize("seed", range(3))
def test_exact_is_never_worse_than_any_other_compensation(settings, seed):
    weight, gram = layer(seed=seed)
    factor = factorise(gram, 0.01, dtype=torch.float64)
    for source in ("single", "sparsegpt", "wanda", "magnitude"):
        found = multiweight.prune(weight, gram, mask=source, **settings)
        best = damped_loss(weight, found.weight, gram)
        assert best <= damped_loss(weight, weight.masked_fill(found.pruned, 0), gram) * (1 + 1e-12)
        for width in (1, 4, 16, 64):
            edited, _ = compensate(weight, found.pruned, factor, width)
            assert best <= damped_loss(weight, edited, gram) * (1 + 1e-12)
            if width == 64:
                assert best == pytest.approx(damped_loss(weight, edited, gram), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_joint_choice_is_no_worse_than_single_on_the_first_group(seed):
    weight, gram = layer(inputs=4, seed=seed)
    joint = multiweight.prune(weight, gram, pattern="2:4", mask="joint")
    single = multiweight.prune(weight, gram, pattern="2:4", mask="single")
    assert damped_loss(weight, joint.weight, gram) <= damped_loss(weight, single.weight, gram) * (1 + 1e-12)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_no_mask_beats_the_brute_force(pattern):
    weight, gram = layer(3, 12)
    kept, group = map(int, pattern.split(":"))
    hessian, masks = dense.damped(gram, 0.01), dense.pattern_masks(12, kept, group)
    best = sum(dense.best_mask(row, hessian, masks)[1] for row in weight)
    for found in (
        multiweight.prune(weight, gram, pattern=pattern),
        sparsegpt.prune(weight, gram, pattern=pattern),
        wanda.prune(weight, gram, pattern=pattern),
    ):
        assert best <= damped_loss(weight, found.weight, gram) * (1 + 1e-12)


def test_sparsegpt_is_algorithm_one():
    weight, gram = layer(5, 24)
    hessian = dense.damped(gram, 0.01)
    edited, pruned = dense.sparsegpt(weight, hessian, 2, 4)
    found = sparsegpt.prune(weight, gram, pattern="2:4")
    assert torch.equal(found.pruned, pruned)
    torch.testing.assert_close(found.weight, edited)
    unstructured = sparsegpt.prune(weight, gram, sparsity=0.5, block=8)
    torch.testing.assert_close(unstructured.weight, dense.sparsegpt_columns(weight, hessian, unstructured.pruned))


def test_lazy_updates_change_nothing():
    weight, gram = layer(4, 48)
    blocks = [sparsegpt.prune(weight, gram, pattern="2:4", block=block).weight for block in (4, 16, 128)]
    torch.testing.assert_close(blocks[0], blocks[1])
    torch.testing.assert_close(blocks[0], blocks[2])


@pytest.mark.parametrize("compensation", ["exact", "block", "sequential", "none"])
def test_every_compensation_keeps_the_mask(compensation):
    weight, gram = layer()
    found = multiweight.prune(weight, gram, sparsity=0.5, compensation=compensation, block=16)
    assert (found.weight[found.pruned] == 0).all()
    if compensation == "none":
        torch.testing.assert_close(found.weight, weight.masked_fill(found.pruned, 0))


def test_chosen_damping_is_the_best_of_the_grid_on_held_out_tokens():
    x = tiny.correlated(32, 40)
    weight = torch.randn(16, 32, dtype=torch.float64)

    sums = Statistics(32, held_out=True, device=torch.device("cpu"))
    sums.update(x[:, :28].T)
    sums.update(x[:, 28:].T, held_out=True)
    grid = (1e-4, 0.01, 0.1, 1.0)
    chosen, error = choose_damping(multiweight.prune, weight, sums, grid, {"sparsity": 0.5})
    errors = {
        p: output_error(
            weight, multiweight.prune(weight, sums.train.second, sparsity=0.5, damping=p).weight, sums.held_out.second
        )
        for p in grid
    }
    assert chosen == min(errors, key=errors.get)
    assert error == pytest.approx(errors[chosen] / output_error(weight, torch.zeros_like(weight), sums.held_out.second))


def test_mean_error_order_over_layers():
    """In practice, on the mean over layers: Wanda > SparseGPT > SparseGPT's mask solved exactly >= ours."""
    totals = dict.fromkeys(("wanda", "sparsegpt", "refit", "ours"), 0.0)
    for seed in range(8):
        weight, gram = layer(32, 96, seed)
        whole = output_error(weight, torch.zeros_like(weight), gram)
        greedy = sparsegpt.prune(weight, gram, sparsity=0.6)
        totals["wanda"] += wanda.prune(weight, gram, sparsity=0.6).error / whole
        totals["sparsegpt"] += greedy.error / whole
        totals["refit"] += reconstruct(weight, gram, greedy.pruned).error / whole
        totals["ours"] += multiweight.prune(weight, gram, sparsity=0.6).error / whole
    assert totals["wanda"] > totals["sparsegpt"] > totals["refit"]
    assert totals["ours"] < 0.95 * totals["sparsegpt"]


def test_joint_mask_needs_a_pattern():
    weight, gram = layer()
    with pytest.raises(Problem, match="needs an N:M pattern"):
        multiweight.prune(weight, gram, sparsity=0.5, mask="joint")


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_sparse_model_stays_sparse(alpha):
    """Half of the weights go, then six tenths: what was gone stays gone, also where the target is the dense model's output."""
    model, tokens = tiny.model("llama"), tiny.ids(8, 24)
    options = {"damping": 0.01, "dense_target": alpha}
    multiweight.apply(model, tokens, sparsity=0.5, **options)
    gone = {name: tensor == 0 for name, tensor in model.state_dict().items() if "_proj" in name}
    multiweight.apply(model, tokens, sparsity=0.6, **options)
    for name, zeros in gone.items():
        after = model.state_dict()[name] == 0
        assert bool((after | ~zeros).all()), f"{name} brought weights back"
        assert float(after.float().mean()) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("pattern", ["16:32", "8:16"])
def test_wide_groups_take_no_longer(pattern):
    torch.manual_seed(0)
    weight, x = torch.randn(16, 64), torch.randn(64, 200)
    assert multiweight.prune(weight, x @ x.T, pattern=pattern, effort="fast").pruned.float().mean() == 0.5
    with pytest.raises(Problem, match="cannot look at"):
        multiweight.prune(weight, x @ x.T, pattern=pattern, mask="joint")


@pytest.mark.parametrize(
    "settings", [{"effort": "fast"}, {"effort": "good"}, {"effort": "best"}, {"method": "sparsegpt"}], ids=str
)
def test_a_pattern_brings_no_removed_weight_back(settings):
    """Where a group has more zeros than the pattern takes."""
    torch.manual_seed(0)
    x = torch.randn(32, 200)
    weight = torch.randn(12, 32) * (torch.rand(12, 32) > 0.6)
    method = sparsegpt.prune if settings.get("method") else partial(multiweight.prune, **settings)
    found = method(weight, x @ x.T, pattern="2:4")
    assert (found.weight[weight == 0] == 0).all()
    assert (found.weight.reshape(12, 8, 4) != 0).sum(-1).max() <= 2


def test_without_held_out_sequences_the_damping_is_the_published_one():
    records = multiweight.apply(tiny.model("llama"), tiny.ids(4, 32), sparsity=0.5, damping="held-out", only=("o",))
    assert {record["damping"] for record in records} == {0.01}
