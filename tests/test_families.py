"""Every family: streamed equals plain, coupled groups are really coupled, names are found, layouts are right."""

import pytest
import torch

import tiny
from duramen.families import find_family, known_families
from duramen.families.model import BlockModel
from duramen.families.select import filter_layers
from duramen.problem import Problem
from duramen.ssm.mixer import ExactScans

LEFT_ALONE = ("router", "gate", "shared_transformer")
"""What no table names: routers, and weights that several blocks share."""
TABLES = ("llama", "qwen2", "opt", "gpt2", "gpt_neox", "bloom", "phi3")


def streamed(model, tokens):
    (hidden,) = model.last_hidden([tokens])
    return model.logits(hidden)


@pytest.mark.parametrize("name", tiny.CONFIGS)
@torch.no_grad()
def test_streamed_equals_plain(name, tmp_path):
    folder, tokens, network = tiny.save(name, tmp_path), tiny.ids(), tiny.model(name)
    stock = network(tokens, use_cache=False).logits
    with ExactScans(network):
        plain = network(tokens, use_cache=False).logits
    torch.testing.assert_close(plain, stock, rtol=0, atol=1e-4 if name in tiny.MAMBA else 0)
    from_disk = BlockModel.from_folder(folder)
    torch.testing.assert_close(streamed(from_disk, tokens), plain, rtol=0, atol=0)
    assert all(parameter.is_meta for parameter in from_disk.blocks.parameters()), "closed blocks must hold no memory"
    torch.testing.assert_close(streamed(from_disk, tokens), plain, rtol=0, atol=0)
    torch.testing.assert_close(streamed(BlockModel.from_module(tiny.model(name)), tokens), stock, rtol=0, atol=0)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_linear_weight_of_a_block_has_a_role(name):
    network = tiny.model(name)
    model = BlockModel.from_module(network)
    matrices = {
        f"{path}.weight"
        for path, module in model.blocks.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }
    named = {f"{layer.removeprefix(model.family.blocks + '.')}.weight" for layer in model.layer_names()}
    assert named == {matrix for matrix in matrices if not any(word in matrix.split(".") for word in LEFT_ALONE)}
    assert all(model.transposed(layer) == (name == "gpt2") for layer in model.layer_names())


@torch.no_grad()
def test_shared_and_stacked_weights_are_read_but_not_kept(tmp_path):
    model = BlockModel.from_folder(tiny.save("zamba2", tmp_path / "zamba2"))
    with model.opened(1) as first, model.opened(3) as second:
        assert any("shared_transformer" in name for name in first.tensors)
        assert not any("shared_transformer" in name for name in second.tensors), "its weights belong to block 1"
    model = BlockModel.from_folder(tiny.save("jamba", tmp_path / "jamba"))
    with model.opened(2) as block:
        assert block.module.feed_forward.experts.gate_up_proj.shape == (2, 96, 32)
        assert not any("experts" in name for name in block.tensors), "the checkpoint holds them expert by expert"


def parameter(network, model, member, index):
    path = member.path if member.outside else f"{model.family.blocks}.{index}.{member.path}"
    found = dict(network.named_parameters(remove_duplicate=False))
    return found.get(path)


@pytest.mark.parametrize("name", TABLES)
@torch.no_grad()
def test_groups_are_coupled_as_the_table_says(name):
    """With one side of a unit zeroed everywhere, the other side of that unit no longer matters, and of no other unit."""
    for group in find_family(name).groups:
        network, tokens = tiny.model(name), tiny.ids()
        model = BlockModel.from_module(network)
        sizes = model.family.sizes(model.config)
        unit = group.count(sizes) - 1
        zeroed_side = group.kind != "width"
        for index in range(len(model.blocks)):
            for member in group.members:
                tensor = parameter(network, model, member, index)
                if tensor is not None and member.reads == zeroed_side:
                    tensor.index_fill_(member.axis, member.indices(sizes, unit), 0.0)
        before = network(tokens).logits
        for where, changes in ((unit, False), (0, True)):
            for member in group.members:
                tensor = parameter(network, model, member, 1)
                if (
                    tensor is not None
                    and member.reads != zeroed_side
                    and not (member.outside and tensor is network.get_input_embeddings().weight)
                ):
                    index = member.indices(sizes, where)
                    tensor.index_add_(member.axis, index, torch.randn_like(tensor.index_select(member.axis, index)))
            after = network(tokens).logits
            assert torch.allclose(before, after, atol=1e-5) != changes, (group.kind, where)


@pytest.mark.parametrize("name", TABLES)
def test_groups_cover_their_axes(name):
    """Producers and consumers of all units together fill every axis, none twice."""
    network = tiny.model(name)
    model = BlockModel.from_module(network)
    sizes = model.family.sizes(model.config)
    for group in model.family.groups:
        covered = {}
        for member in group.members:
            tensor = parameter(network, model, member, 0)
            if tensor is not None:
                units = torch.cat([member.indices(sizes, unit) for unit in range(group.count(sizes))])
                covered.setdefault((member.path, member.axis), (tensor, []))[1].append(units)
        assert covered
        for (path, axis), (tensor, units) in covered.items():
            entries = torch.cat(units)
            assert len(entries.unique()) == len(entries), path
            assert entries.max() < tensor.shape[axis], path
            if (group.kind, name) != ("query_head", "phi3"):
                assert len(entries) == tensor.shape[axis], (group.kind, path)


def test_no_model_type_is_claimed_twice():
    assert len(known_families()) == len(tiny.CONFIGS)


def test_unknown_architecture():
    with pytest.raises(Problem, match="no family table for the architecture 'rwkv'") as caught:
        find_family("rwkv")
    assert "--allow-generic" in caught.value.fix


def relabelled(folder):
    """The same folder under an architecture name that no table lists, which transformers opens all the same."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "seed_oss"'))
    return folder


@torch.no_grad()
def test_generic_guesses_blocks_and_layers(tmp_path):
    model = BlockModel.from_folder(relabelled(tiny.save("llama", tmp_path)), allow_generic=True)
    assert model.family.name == "generic"
    assert model.family.blocks == "model.layers"
    assert len(model.layer_names()) == 21
    tokens = tiny.ids()
    torch.testing.assert_close(streamed(model, tokens), tiny.model("llama")(tokens).logits, rtol=0, atol=0)


NAMES = {
    f"model.layers.{block}.{path}": (role, block)
    for block in range(4)
    for role, path in (("q", "attn.q_proj"), ("up", "mlp.up_proj"))
}


@pytest.mark.parametrize(
    ("only", "skip", "count"),
    [
        ((), (), 8),
        (("q",), (), 4),
        (("blocks:1-2",), (), 4),
        (("blocks:3",), ("q",), 1),
        (("*.mlp.*",), (), 4),
        ((), ("q", "blocks:0-2"), 1),
    ],
)
def test_filters(only, skip, count):
    assert len(filter_layers(NAMES, only, skip)) == count


@pytest.mark.parametrize(("only", "skip"), [(("z",), ()), ((), ("*.nothing",)), (("blocks:9",), ()), (("q",), ("q",))])
def test_a_filter_that_matches_nothing_stops(only, skip):
    with pytest.raises(Problem, match="matches no layer"):
        filter_layers(NAMES, only, skip)
