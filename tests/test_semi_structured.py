"""2:4 packing loses nothing, and refuses what it would lose."""

import pytest
import torch
from torch import nn

from duramen.export.semi_structured import pack, pack_linears, why_not
from duramen.problem import Problem
from duramen.prune import magnitude


def pruned(pattern, *shape, dtype=torch.bfloat16):
    weight = torch.randn(*shape)
    return magnitude.prune(weight, torch.eye(shape[1]), pattern=pattern).weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (96, 128)])
def test_packing_comes_back_whole(dtype, shape):
    weight = pruned("2:4", *shape, dtype=dtype)
    values, places = pack(weight)
    assert values.shape == (shape[0], shape[1] // 2)
    assert places.nbytes * 8 == weight.numel() * 2 // 2, "two bits for each kept weight, on average one per weight"
    groups, kept = weight.view(-1, 4), values.view(-1, 2)
    for group, pair in zip(groups[:50], kept[:50], strict=True):
        assert set(group[group != 0].tolist()) <= set(pair.tolist())


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.randn(32, 64).bfloat16(), "more than two"),
        (pruned("4:8", 32, 64), "more than two"),
        (pruned("2:4", 32, 64, dtype=torch.float32), "float32"),
        (pruned("2:4", 20, 64), "multiple"),
    ],
)
def test_what_would_be_lost_is_refused(weight, reason):
    with pytest.raises(Problem, match=reason):
        pack(weight)


def test_sparser_groups_are_packed_too():
    assert why_not(pruned("1:4", 32, 64)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse tensor cores")
@torch.no_grad()
def test_packed_linears_multiply_alike():
    network = nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 64, bias=False)).to("cuda", torch.float16)
    network[0].weight.copy_(pruned("2:4", 64, 128, dtype=torch.float16))
    inputs = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    before = network(inputs)
    assert pack_linears(network) == ["0"]
    torch.testing.assert_close(network(inputs), before, rtol=1e-2, atol=1e-2)


def test_without_a_gpu_the_folder_stays_as_it_is():
    with pytest.raises(Problem, match="cannot be multiplied on cpu"):
        pack_linears(nn.Linear(64, 32))
