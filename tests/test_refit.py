"""The refit: the optimum by its certificate and by least squares, whole models nearer to the dense one, masks kept, layers left alone that should be."""

import json

import pytest
import torch

import duramen
import tiny
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.prune.factor import factorise
from duramen.recover.refit import distance, refit
from duramen.registry import get_method
from duramen.shrink.surgery import shrunk


def problem(seed, inputs=12, wider=15, outputs=5, tokens=80):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dense, edited = draw(wider, tokens), draw(inputs, tokens)
    edited += dense[:inputs]
    pruned = torch.rand(outputs, inputs, generator=generator) < 0.5
    return dense, edited, draw(outputs, wider), draw(outputs, inputs).masked_fill(pruned, 0), pruned


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("damping", [1e-6, 0.1, 1.0])
def test_the_optimum_has_its_certificate_and_is_that_of_least_squares(seed, damping):
    dense, edited, goal, weight, pruned = problem(seed)
    gram, cross = edited @ edited.T, dense @ edited.T
    found = refit(weight, goal, cross, pruned, factorise(gram, damping, dtype=torch.float64))
    strength = damping * gram.diagonal().mean()
    residual = goal @ cross + strength * weight - found @ (gram + strength * torch.eye(len(gram)))
    assert residual.masked_fill(pruned, 0).abs().max() < 1e-6 * (goal @ cross).abs().max()
    assert (found[pruned] == 0).all()
    for row, mask in enumerate(~pruned):
        root = strength.sqrt() * torch.eye(int(mask.sum()), dtype=torch.float64)
        left = torch.cat([edited[mask].T, root])
        right = torch.cat([dense.T @ goal[row], strength.sqrt() * weight[row, mask]])
        expected = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row, mask], expected, rtol=1e-5, atol=1e-6)
    whole = float(((goal @ dense) ** 2).sum())
    assert distance(found, goal, gram, cross) + whole == pytest.approx(float(((goal @ dense - found @ edited) ** 2).sum()))
    if damping < 1e-3:
        assert distance(found, goal, gram, cross) <= distance(weight, goal, gram, cross)


@torch.no_grad()
def divergence(model, dense, tokens):
    p, q = (network(tokens).logits.log_softmax(-1) for network in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def pruned_model(name, method="magnitude"):
    network, tokens = tiny.model(name), tiny.ids(24, 32)
    get_method(method).apply(network, tokens, sparsity=0.5)
    return network, tiny.model(name), tokens


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "gpt2", "mamba", "jamba"])
def test_a_pruned_model_comes_nearer_and_stays_sparse(name):
    network, dense, tokens = pruned_model(name)
    zeros = {key: value == 0 for key, value in network.state_dict().items()}
    before = divergence(network, dense, tokens)
    records = get_method("refit").apply(network, tokens, dense=dense, damping=0.01)
    assert divergence(network, dense, tokens) < (0.9 if name in tiny.MAMBA else 0.8) * before
    assert all(record["relative_error"] <= record["error_before"] * 1.001 for record in records)
    assert any(record["moved"] for record in records)
    names = {record["layer"] for record in records}
    for key, value in network.state_dict().items():
        if key.removesuffix(".weight") in names:
            assert (value[zeros[key]] == 0).all(), key


@torch.no_grad()
def test_biases_make_up_for_the_means():
    network, dense, tokens = pruned_model("opt")
    get_method("refit").apply(network, tokens, dense=dense, damping=0.01, dense_target=1.0, only=["blocks:0"])
    seen = {}
    for which, model in (("new", network), ("old", dense)):
        layer = model.get_submodule("model.decoder.layers.0.fc2")
        with layer.register_forward_hook(lambda _, args, output, which=which: seen.update({which: output})):
            model(tokens)
    torch.testing.assert_close(seen["new"].flatten(0, 1).mean(0), seen["old"].flatten(0, 1).mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_cut_model_is_refitted_to_the_wider_one(name):
    network, tokens, walk = tiny.model(name), tiny.ids(24, 32), Walk()
    get_method("flap").apply(network, tokens, walk=walk, ratio=0.3, repair="none", round_to=4, minimum=4)
    small, dense = shrunk(BlockModel.from_module(tiny.model(name)), walk.reshape.plan), tiny.model(name)
    before = divergence(small, dense, tokens)
    records = get_method("refit").apply(small, tokens, dense=dense)
    assert {record["role"] for record in records} == {"down"}
    assert divergence(small, dense, tokens) < before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cut_that_was_not_repaired_is_refitted_to_what_its_repair_would_have_been(name, tmp_path):
    folder, text = tiny.save(name, tmp_path / name), tmp_path / "prose.txt"
    text.write_text(tiny.prose(1, 4000))
    measured = {
        "method": "evaluate",
        "text": [str(tmp_path / "other.txt")],
        "length": 64,
        "windows": 6,
        "prompts": [],
        "latency": False,
    }
    (tmp_path / "other.txt").write_text(tiny.prose(2, 4000))
    head = {"calibration": {"text": [str(text)], "sequences": 24, "length": 32}, "dtype": "float32"}
    cut = {"method": "wanda_sp", "ratio": 0.2, "round_to": 1, "minimum": 2, "damping": 0.01}

    def kl(place, *steps):
        found = duramen.run(head | {"steps": [*steps, measured]}, str(folder), tmp_path / place)
        return found["evaluations"][0]["perplexity"]["other"]["kl"]["value"]

    bare, repaired = kl("bare", cut | {"repair": "none"}), kl("repaired", cut | {"repair": "affine", "dense_target": 0.25})
    refitted = kl("refitted", cut | {"repair": "none"}, {"method": "refit", "damping": 0.01, "dense_target": 0.25})
    assert repaired < 0.9 * bare
    assert refitted == pytest.approx(repaired, rel=0.05)


def test_a_layer_stays_where_the_held_out_sequences_say_so():
    """With fewer tokens than inputs and no damping, what fits them leads others astray."""
    network, dense, _ = pruned_model("llama")
    tokens = tiny.ids(4, 6)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    records = get_method("refit").apply(network, tokens, dense=dense, damping=0.0, held_out=0.5)
    still = [record["layer"] for record in records if not record["moved"]]
    assert still
    for name in still:
        assert torch.equal(network.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
        (record,) = [each for each in records if each["layer"] == name]
        assert record["relative_error"] == record["error_before"]


def test_a_recipe_prunes_and_refits(tmp_path):
    folder, text = tiny.save("llama", tmp_path / "llama"), tmp_path / "prose.txt"
    text.write_text(tiny.prose(1, 4000))
    head = {"calibration": {"text": [str(text)], "sequences": 16, "length": 32}, "dtype": "float32"}
    prune = {"method": "magnitude", "pattern": "2:4"}
    duramen.run(head | {"steps": [prune, {"method": "refit"}]}, str(folder), tmp_path / "both")
    layers = json.loads((tmp_path / "both" / "results.json").read_text())["steps"][1]["layers"]
    assert len(layers) == 21
    assert sum(layer["relative_error"] for layer in layers) < 0.8 * sum(layer["error_before"] for layer in layers)
    found = duramen.inspect(str(tmp_path / "both"))
    assert found["masks"]["broken"] == []
    assert found["masks"]["removed"] * 2 == found["masks"]["size"]
    duramen.run(head | {"steps": [prune]}, str(folder), tmp_path / "first")
    again = head | {"steps": [{"method": "refit", "parent": str(folder)}]}
    duramen.run(again, str(tmp_path / "first"), tmp_path / "second")
    names = [file.name for file in (tmp_path / "both").glob("*.safetensors")]
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    with pytest.raises(Problem, match="no dense model to refit to"):
        duramen.run(head | {"steps": [{"method": "refit"}]}, str(tmp_path / "first"), tmp_path / "third")
    with pytest.raises(Problem, match="No layer of this model lost anything"):
        duramen.run(again, str(folder), tmp_path / "fourth")
    few = head | {"calibration": {"text": [str(text)], "sequences": 4, "length": 32}, "steps": [prune, {"method": "refit"}]}
    with pytest.raises(Problem, match="leave none to set apart"):
        duramen.run(few, str(folder), tmp_path / "sixth")
    dropped = head | {"steps": [{"method": "depth", "count": 1}, {"method": "refit"}]}
    with pytest.raises(Problem, match="The dense model has 3 blocks"):
        duramen.run(dropped, str(folder), tmp_path / "fifth")
