"""The walker: its statistics are those of a plain forward pass, its boundary is that of the edited model."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Walk, split_batches
from duramen.calibrate.walker import walk_blocks as walk_stages
from duramen.families.model import BlockModel
from duramen.finite import all_finite
from duramen.problem import Problem
from duramen.prune import wanda
from duramen.ssm.mixer import ExactScans, find_mixers


def walk_blocks(model, tokens, edit, names, **how):
    """A walk whose edit takes one layer at a time."""
    return walk_stages(model, tokens, lambda _, statistics: lambda layer: edit(layer, statistics), names, **how)


def plain_grams(network, names, tokens):
    """Σ x xᵀ at each layer's input, by hooks on the whole model; a dt_proj reads the step size that x_proj computed."""
    grams = {}

    def add(name, inputs):
        x = inputs.flatten(0, -2).double()
        grams[name] = grams.get(name, 0) + x.T @ x

    def watch(name):
        layer = network.get_submodule(name)
        if not name.endswith("dt_proj"):
            return layer.register_forward_pre_hook(lambda _, args: add(name, args[0]))
        mixer = network.get_submodule(name.removesuffix(".dt_proj"))
        rank = layer.weight.shape[1]

        def normed(x):
            if not hasattr(mixer, "dt_layernorm"):
                return x
            scale = mixer.dt_layernorm.weight if len(mixer.dt_layernorm.weight) == rank else 1.0
            return scale * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

        return mixer.x_proj.register_forward_hook(lambda _, args, output: add(name, normed(output[..., :rank])))

    handles = [watch(name) for name in names]
    for batch in tokens.split(1):
        network(batch)
    for handle in handles:
        handle.remove()
    return grams


@pytest.mark.parametrize("name", tiny.CONFIGS)
@torch.no_grad()
def test_statistics_are_those_of_a_plain_forward_pass(name, tmp_path):
    tokens, seen = tiny.ids(6, 20), {}

    def edit(layer, statistics):
        seen[layer.name] = statistics
        return {}

    model = BlockModel.from_folder(tiny.save(name, tmp_path))
    walk_blocks(model, tokens, edit, list(model.layer_names()), walk=Walk(batch_size=4), dense_target=True)
    network = tiny.model(name)
    with ExactScans(network):
        expected = plain_grams(network, model.layer_names(), tokens)
    assert seen.keys() == expected.keys()
    for layer, statistics in seen.items():
        for found in (statistics.total, statistics.dense):
            torch.testing.assert_close(found.second, expected[layer], rtol=1e-4, atol=1e-4)
        assert statistics.tokens == 120


@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba"])
@torch.no_grad()
def test_a_walk_leaves_the_mixers_on_the_scans_that_they_ran_on(name, tmp_path):
    """Also where the dense model runs in step, in copies of the blocks, which run on weights of their own."""
    model, tokens = BlockModel.from_folder(tiny.save(name, tmp_path)), tiny.ids(6, 20)
    before = {path: model.network.get_submodule(path).__dict__["forward"] for path in find_mixers(model.network)}
    assert before
    copied = copy.deepcopy(model.blocks[0])
    for path, mixer in copied.named_modules():
        if "forward" in mixer.__dict__:
            assert mixer.forward.args[0] is mixer, path
    walk_blocks(model, tokens, lambda layer, s: {}, list(model.layer_names()), walk=Walk(), dense_target=True)
    for path, forward in before.items():
        assert model.network.get_submodule(path).__dict__["forward"] is forward


@torch.no_grad()
def test_layers_with_one_input_share_one_pass(llama):
    seen = {}
    model = BlockModel.from_folder(llama)
    walk_blocks(
        model, tiny.ids(), lambda layer, s: seen.setdefault(layer.name, s) and {}, list(model.layer_names()), walk=Walk()
    )
    first = "model.layers.0."
    assert seen[first + "self_attn.q_proj"] is seen[first + "self_attn.v_proj"]
    assert seen[first + "mlp.gate_proj"] is seen[first + "mlp.up_proj"]
    assert seen[first + "mlp.up_proj"] is not seen[first + "mlp.down_proj"]


@torch.no_grad()
def test_the_boundary_is_that_of_the_partly_edited_model(llama):
    """Statistics of block 2 equal those of a plain forward pass through the model with blocks 0 and 1 edited."""
    network, tokens, seen = tiny.model("llama"), tiny.ids(4, 20), {}

    def edit(layer, statistics):
        seen[layer.name] = statistics
        if layer.block < 2:
            layer.write(0.5 * layer.read())
        return {}

    model = BlockModel.from_folder(llama)
    walk = Walk()
    walk_blocks(model, tokens, edit, list(model.layer_names()), walk=walk)
    for layer in model.layer_names():
        if ".2." not in layer:
            network.get_submodule(layer).weight.mul_(0.5)
    expected = plain_grams(network, model.layer_names(), tokens)
    for layer in model.layer_names():
        if ".2." in layer:
            torch.testing.assert_close(seen[layer].total.second, expected[layer], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.logits(walk.final_hidden), network(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_both_boundaries(llama):
    """With a dense target the cross moments are those of the dense inputs by the edited inputs."""
    tokens, seen = tiny.ids(4, 20), {}

    def edit(layer, statistics):
        seen[layer.name] = statistics
        if layer.block == 0:
            layer.write(0.5 * layer.read())
        return {}

    model = BlockModel.from_folder(llama)
    walk_blocks(model, tokens, edit, list(model.layer_names()), walk=Walk(), dense_target=True)
    dense, edited = tiny.model("llama"), tiny.model("llama")
    for layer in model.layer_names():
        if ".0." in layer:
            edited.get_submodule(layer).weight.mul_(0.5)
    name, inputs = "model.layers.1.mlp.down_proj", {}
    for label, network in (("dense", dense), ("edited", edited)):
        handle = network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, label=label: inputs.update({label: args[0]})
        )
        network(tokens)
        handle.remove()
    x, y = (inputs[label].flatten(0, -2).double() for label in ("dense", "edited"))
    torch.testing.assert_close(seen[name].cross, x.T @ y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[name].dense.second, x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[name].total.second, y.T @ y, rtol=1e-4, atol=1e-4)


def test_held_out_sums_add_up():
    sums = Statistics(5, held_out=True, device=torch.device("cpu"))
    batches = torch.randn(3, 7, 5)
    for number, batch in enumerate(batches):
        sums.update(batch, held_out=number == 2)
    torch.testing.assert_close(sums.train.second, sum(b.double().T @ b.double() for b in batches[:2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.train.second + sums.held_out.second, sums.total.second)
    assert (sums.tokens, sums.held_out.count) == (21, 7)


def test_held_out_sequences_keep_to_their_own_batches():
    tokens = torch.arange(20)[:, None]
    batches, held_out = split_batches(tokens, 4, 5)
    aside = torch.cat([batch for batch, flag in zip(batches, held_out, strict=True) if flag])
    assert aside[:, 0].tolist() == [4, 9, 14, 19]
    assert sorted(torch.cat(batches)[:, 0].tolist()) == list(range(20))


@torch.no_grad()
def test_in_place_and_from_disk_agree(llama):
    tokens, network = tiny.ids(4, 30), tiny.model("llama")
    records = wanda.apply(network, tokens, sparsity=0.5)
    again = wanda.apply(BlockModel.from_folder(llama), tokens, sparsity=0.5)
    assert [record["relative_error"] for record in records] == [record["relative_error"] for record in again]
    assert all(record["relative_error"] > 0 for record in records)
    for record in records:
        weight = network.get_submodule(record["layer"]).weight
        assert int((weight == 0).sum()) == record["removed"] == weight.numel() // 2


@torch.no_grad()
def test_a_layer_that_is_never_called_is_named(llama):
    model = BlockModel.from_module(tiny.model("llama"))
    model.blocks[1].mlp.forward = lambda x: x
    with pytest.raises(Problem, match=r"model\.layers\.1\.mlp\.gate_proj saw no tokens"):
        wanda.apply(model, tiny.ids(), sparsity=0.5)


@torch.no_grad()
def test_activations_that_overflow_are_named():
    network = tiny.model("llama")
    nn.init.constant_(network.model.layers[1].mlp.down_proj.weight, 1e38)
    with pytest.raises(Problem, match=r"model\.layers\.1"):
        wanda.apply(network, tiny.ids(), sparsity=0.0, skip=("*.1.mlp.down_proj",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_what_is_not_finite_is_refused(dtype):
    most = torch.full((3, 70000), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(most)  # its sum is not
    assert all_finite(most[:0])
    for bad in (torch.nan, torch.inf, -torch.inf):
        one = torch.zeros(5, dtype=dtype)
        one[2] = bad
        assert not all_finite(one)
    assert not all_finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))


def test_a_gradient_of_sparsity_over_depth(llama):
    records = wanda.apply(BlockModel.from_folder(llama), tiny.ids(), sparsity=(0.25, 0.75), only=("up",))
    assert [record["removed"] / record["size"] for record in records] == [0.25, 0.5, 0.75]


@torch.no_grad()
def test_what_no_longer_changes_is_not_run_again(llama):
    model, calls = BlockModel.from_folder(llama), []

    def count(module, args, output):
        if len(output) == 4:
            calls.append(module)

    handles = [block.self_attn.q_proj.register_forward_hook(count) for block in model.blocks]
    walk_blocks(model, tiny.ids(4, 20), lambda layer, s: {}, list(model.layer_names()), walk=Walk(batch_size=4))
    for handle in handles:
        handle.remove()
    assert len(calls) == 2 * len(model.blocks), "once for o's input, once for the rest; never again for down or the boundary"
    assert not any("forward" in vars(child) for block in model.blocks for child in block.children())


@torch.no_grad()
def test_what_a_block_writes_over_is_run_again(llama):
    model, network, tokens, walk = BlockModel.from_folder(llama), tiny.model("llama"), tiny.ids(4, 20), Walk(batch_size=2)
    for block in model.blocks:
        block.mlp.act_fn = nn.SiLU(inplace=True)
    walk_blocks(model, tokens, lambda layer, s: {}, list(model.layer_names()), walk=walk)
    torch.testing.assert_close(model.logits(walk.final_hidden), network(tokens[:2]).logits, rtol=1e-4, atol=1e-4)


def test_the_next_block_is_read_ahead(tmp_path, monkeypatch):
    """While a block is open, exactly the bytes of the next one's tensors are asked for."""
    folder, asked = tiny.save("llama", tmp_path / "model"), []
    data = next(folder.glob("*.safetensors")).read_bytes()
    monkeypatch.setattr(
        "os.posix_fadvise", lambda _, start, length, advice: asked.append(data[start : start + length]), raising=False
    )
    model = BlockModel.from_folder(folder)
    with model.opened(0):
        pass
    stored = load_file(next(folder.glob("*.safetensors")))
    expected = [tensor.numpy().tobytes() for name, tensor in stored.items() if ".layers.1." in name]
    assert sorted(asked) == sorted(expected)
    asked.clear()
    with model.opened(len(model.blocks) - 1):
        assert not asked
