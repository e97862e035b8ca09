"""Images: sets that are what they should be, files of any kind and damaged ones, training that resumes to the bit, and a recipe from nothing to a report."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import duramen
import tiny
from duramen.problem import Problem
from duramen.progress import describe
from duramen.train.schedule import Schedule
from duramen.vision import VimConfig, VimForImageClassification, evaluate_images, story, train_images
from duramen.vision.images import SHAPES, decode, open_images, seen_by, shapes, shapes_with_masks
from duramen.vision.train import Classification, train_classifier
from duramen.vision.train_images import ARCHITECTURES

RECIPE = {
    "name": "shapes", "images": {"data": "shapes", "size": 16, "channels": 3, "train": 120, "test": 40, "held_out": 0.2},
    "steps": [
        {"method": "train_images", "id": "train", "width": 16, "layers": 3, "steps": 4, "every": 2, "batch": 16, "patch": 4},
        {"method": "patch_pruning", "cut": 0.3},
        {"method": "train_images", "id": "tune", "steps": 2, "every": 1, "batch": 16, "learning_rate": 5e-4},
        {"method": "evaluate_images", "batches": [2]},
    ],
}  # fmt: skip


def files(folder):
    """Two classes of files of many kinds."""
    for number, (name, mode, suffix) in enumerate(
        [
            ("cat", "RGB", "png"),
            ("cat", "L", "jpg"),
            ("cat", "CMYK", "jpg"),
            ("dog", "RGBA", "png"),
            ("dog", "P", "gif"),
            ("dog", "I;16", "png"),
        ]
    ):
        for split in ("train", "test"):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (20 + number, 30)).save(place / f"{number}.{suffix}")
    return folder


def test_shapes_are_told_apart_and_drawn_alike_each_time():
    found = shapes(400, 32, seed=3)
    assert torch.equal(found.values, shapes(400, 32, seed=3).values)
    assert not torch.equal(found.values, shapes(400, 32, seed=4).values)
    assert set(found.labels.tolist()) == set(range(len(SHAPES)))
    strong = ((found.values == 255) | (found.values == 0)).all(1).flatten(1).float().mean(1)
    assert 0.005 < float(strong.min()) < float(strong.max()) < 0.12, "most of an image says nothing"


@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_any_kind_become_images(channels, tmp_path):
    found = open_images(str(files(tmp_path)), "train", size=12, channels=channels)
    assert found.classes == ("cat", "dog")
    assert sorted(found.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert [found.classes[label] for label in found.labels] == [file.parent.name for file in found.files]
    assert found.pixels(range(6)).shape == (6, channels, 12, 12)
    assert found.part(torch.tensor([4, 1])).labels.tolist() == found.labels[[4, 1]].tolist()
    Image.linear_gradient("L").resize((40, 20)).save(tmp_path / "train" / "cat" / "0.png")
    drawn = open_images(str(tmp_path), "train", size=10, channels=1)
    place = next(number for number, file in enumerate(drawn.files) if file.name == "0.png")
    middle = drawn.pixels([place])[0, 0].float()
    assert (middle[:, 0] - middle[:, -1]).abs().max() == 0
    assert (middle[1:] > middle[:-1]).all()


def test_damaged_files_are_named(tmp_path):
    bad = files(tmp_path) / "train" / "dog" / "broken.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(Problem, match=r"broken\.jpg cannot be read as an image"):
        open_images(str(tmp_path), "train", size=8)
    (tmp_path / "train" / ".cache").mkdir()
    found = open_images(str(tmp_path), "train", size=8, corrupt="skip")
    assert (len(found.labels), found.classes) == (6, ("cat", "dog"))
    assert [file for file, _ in found.skipped] == [bad]
    assert "cannot identify" in found.skipped[0][1]
    events = {}
    recipe = {"images": {"data": str(tmp_path), "size": 8, "held_out": 0.4, "corrupt": "skip"}, "steps": RECIPE["steps"][:1]}
    duramen.run(recipe, "new", tmp_path / "out", progress=lambda event, fields: events.update({event: fields}))
    assert "broken.jpg: cannot identify" in describe("skipped", events["skipped"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["skipped"]) == [str(bad)]
    assert "1 image files could not be read" in (tmp_path / "out" / "report.html").read_text()
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.num_channels == 3
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(Problem, match="no readable image of `emu`"):
        open_images(str(tmp_path), "train", size=8, corrupt="skip")
    (tmp_path / "train" / "emu").rmdir()
    for file in (tmp_path / "train" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(Problem, match="no readable image of `dog`"):
        open_images(str(tmp_path), "train", size=8, corrupt="skip")
    (tmp_path / "one" / "cat").mkdir(parents=True)
    with pytest.raises(Problem, match="one class of images"):
        open_images(str(tmp_path / "one"), "test", size=8)
    with pytest.raises(Problem, match="no classes of images"):
        open_images(str(tmp_path / "nowhere"), "test", size=8)


def test_an_image_stands_as_its_camera_says(tmp_path):
    upright = Image.linear_gradient("L").resize((16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert torch.equal(*(decode(tmp_path / f"{name}.png", 16, 1) for name in ("turned", "upright")))


def test_training_resumes_to_the_bit_and_learns(tmp_path):
    images = shapes(200, 16, seed=0)
    train, aside = images.part(torch.arange(160)), images.part(torch.arange(160, 200))
    config = VimConfig(hidden_size=16, num_hidden_layers=2, image_size=16, patch_size=4, state_size=4, num_labels=10)
    config.reduction = {"sites": [0], "keep": [0.7]}
    schedule = Schedule(40, batch=32, at_once=16, every=8)
    states = []
    for stops in ((), (8,)):
        torch.manual_seed(0)
        network = VimForImageClassification(config)

        def tell(done, loss, stops=stops):
            if done in stops:
                raise KeyboardInterrupt

        for again in range(1 + len(stops)):
            try:
                history = train_classifier(
                    Classification(network, train, aside), schedule, 3e-3, folder=tmp_path / str(stops),
                    tell=tell if not again else lambda done, loss: None,
                )  # fmt: skip
            except KeyboardInterrupt:
                torch.manual_seed(0)
                network = VimForImageClassification(config)
        states.append(network.state_dict())
    assert sum(history.losses[-8:]) < 0.99 * sum(history.losses[:8])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_from_nothing_to_a_report(tmp_path):
    found = duramen.run(RECIPE, "new", tmp_path / "out")
    assert [step["method"] for step in found["steps"]] == ["train_images", "patch_pruning", "train_images"]
    macs = found["steps"][1]["macs"]
    saved = 1 - macs["reduced"] / macs["dense"]
    assert 0.3 <= saved < 0.36, "whole patches leave"
    assert found["steps"][2]["trainings"][0]["distilled"]
    measured = found["evaluations"][0]
    assert measured["images"] == 40
    assert set(measured["accuracy"]) == set(measured["speed"]) == {"before", "after"}
    left = [cell for image in measured["shown"] for cell in image["left_after"]]
    assert {None, *found["steps"][1]["reduction"]["sites"]} == set(left)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<img class="map"') == 8 * (1 + len(found["steps"][1]["reduction"]["sites"]))
    assert f"{saved:.0%} of the multiply-adds" in page
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert network(torch.zeros(1, 3, 16, 16)).positions.shape[1] < 17
    assert duramen.report(tmp_path / "out").read_text() == page
    assert duramen.run(RECIPE, "new", tmp_path / "out") == found
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    again = duramen.run(
        RECIPE | {"steps": [*RECIPE["steps"][1:2], RECIPE["steps"][3]]}, str(tmp_path / "out"), tmp_path / "next"
    )
    assert (
        manifest["files"]["model.safetensors"]
        == json.loads((tmp_path / "next" / "manifest.json").read_text())["files"]["model.safetensors"]
    )
    assert again["evaluations"][0]["accuracy"]["after"]["samples"] == 40


def test_a_run_of_images_goes_on_where_it_stopped(tmp_path, monkeypatch):
    duramen.run(RECIPE, "new", tmp_path / "whole")
    monkeypatch.setattr(evaluate_images, "_speed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        duramen.run(RECIPE, "new", tmp_path / "out")
    monkeypatch.undo()
    events = []
    duramen.run(RECIPE, "new", tmp_path / "out", progress=lambda event, _: events.append(event))
    assert "trained" not in events
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_images_keep_what_they_need_under_a_mean_budget(tmp_path):
    steps = [RECIPE["steps"][0], {"method": "patch_pruning", "cut": 0.3, "adaptive": True, "sites": [0, 1], "choose": False}]
    found = duramen.run(RECIPE | {"steps": steps}, "new", tmp_path / "out")["steps"][1]
    assert 0 < found["reduction"]["mass"] < 1
    assert 1 - found["macs"]["reduced"] / found["macs"]["dense"] == pytest.approx(0.3, abs=0.05)
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    drawn = shapes(24, 16, seed=9).values
    Image.fromarray(drawn[0].permute(1, 2, 0).numpy()).resize((61, 37)).save(tmp_path / "wide.png")
    processed = AutoImageProcessor.from_pretrained(tmp_path / "out")(Image.open(tmp_path / "wide.png"), return_tensors="pt")
    mine = seen_by(network, decode(tmp_path / "wide.png", 16)[None])
    torch.testing.assert_close(processed["pixel_values"], mine, rtol=0, atol=1e-6)
    output = network(seen_by(network, drawn))
    assert len(set(output.counts[:, -1].tolist())) > 1
    assert (output.counts[:, 1] <= output.counts[:, 0]).all()
    for wrong in ({"keep": [0.5]}, {"mass": 0.5}, {"kind": "merge", "keep": []}):
        with pytest.raises(Problem, match="adaptive"):
            duramen.run(RECIPE | {"steps": [steps[0], steps[1] | wrong]}, "new", tmp_path / "no")
    with pytest.raises(Problem, match="95% of the multiply-adds cannot be cut after the layers 0, 1") as caught:
        duramen.run(RECIPE | {"steps": [steps[0], steps[1] | {"cut": 0.95}]}, "new", tmp_path / "much")
    assert "at most" in caught.value.why


def test_a_teacher_of_another_kind_and_size(tmp_path):
    torch.manual_seed(0)
    ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=24, patch_size=8, num_labels=10, num_channels=1)
    ).save_pretrained(tmp_path / "vit")  # fmt: skip
    step = RECIPE["steps"][0] | {"parent": str(tmp_path / "vit"), "distill_weight": 1.0}
    found = duramen.run(RECIPE | {"steps": [step]}, "new", tmp_path / "out")["steps"][0]["trainings"][0]
    assert found["distilled"]
    assert found["terms"][-1]["divergence"] < found["terms"][0]["divergence"]
    for wrong, words in ((tmp_path, "no classifier"), (tmp_path / "three", "tells 3 classes apart")):
        ViTForImageClassification(
            ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=3)
        ).save_pretrained(tmp_path / "three")
        with pytest.raises(Problem, match=words):
            duramen.run(RECIPE | {"steps": [step | {"parent": str(wrong)}]}, "new", tmp_path / f"no {words}")


def test_a_model_that_says_nothing_finite_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(story, "logits_of", lambda network, pixels: torch.full((len(pixels), 10), torch.nan))
    with pytest.raises(Problem, match="was reopened and its logits differ by nan"):
        duramen.run(RECIPE | {"steps": RECIPE["steps"][:1]}, "new", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_test_images_decide_nothing(tmp_path):
    duramen.run(RECIPE | {"steps": RECIPE["steps"][:1]}, "new", tmp_path / "trained")
    for number in range(10):
        (tmp_path / "test" / str(number)).mkdir(parents=True)
        Image.linear_gradient("L").save(tmp_path / "test" / str(number) / "0.png")
    (tmp_path / "test").rename(tmp_path / "photos")
    fixed = {"method": "patch_pruning", "cut": 0.3, "choose": False}
    for step in (fixed | {"adaptive": True}, fixed | {"choose": True}):
        with pytest.raises(Problem, match="no training images"):
            duramen.run(
                {"images": {"data": str(tmp_path / "photos")}, "steps": [step]}, str(tmp_path / "trained"), tmp_path / "a"
            )


def test_other_images_are_another_run(tmp_path, monkeypatch):
    folder = files(tmp_path / "photos")
    recipe = {
        "images": {"data": str(folder), "size": 8, "channels": 3, "held_out": 0.4},
        "steps": [
            RECIPE["steps"][0] | {"patch": 4, "steps": 1, "every": 1, "batch": 2},
            {"method": "evaluate_images", "batches": [1]},
        ],
    }
    monkeypatch.setattr(evaluate_images, "_speed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        duramen.run(recipe, "new", tmp_path / "out")
    monkeypatch.undo()
    Image.linear_gradient("L").save(folder / "train" / "cat" / "0.png")
    with pytest.raises(Problem, match=r"holds another run; it differs in:\n    images\[0\]"):
        duramen.run(recipe, "new", tmp_path / "out")


def test_what_cannot_be_run_is_said(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for recipe, model, words in (
        (RECIPE, "nothing", "no model of images `nothing`"),
        (RECIPE, str(tiny.save("llama", tmp_path / "llama")), "cannot be opened as a classifier"),
        (RECIPE | {"steps": RECIPE["steps"][1:]}, "new", "There is no model yet"),
        (RECIPE | {"steps": [{"method": "rtn"}]}, "new", "`rtn` is no step for images"),
        (RECIPE | {"images": RECIPE["images"] | {"size": 18}}, "new", "Patches of 4 pixels do not fill an image of 18"),
        (RECIPE | {"images": RECIPE["images"] | {"train": 4}}, "new", "4 images leave none to set apart"),
        (RECIPE | {"images": {"data": str(tmp_path / "nowhere")}}, "new", "no classes of images"),
    ):
        with pytest.raises(Problem, match=words):
            duramen.run(recipe, model, out / words[:5])
    with pytest.raises(Problem, match="are not forecast"):
        duramen.plan(RECIPE, "new")
    monkeypatch.setattr(train_images, "train_classifier", None)
    for step, words in (
        ({"method": "patch_pruning", "cut": 0.9, "sites": [1]}, "cannot be cut after the layers"),
        ({"method": "patch_pruning", "sites": [2], "keep": [0.5]}, "Patches cannot leave after layer 2 of 3"),
        ({"method": "vit_search", "target": 10}, "The model is no supernet"),
        ({"method": "export_images"}, "no whole numbers to export"),
        ({"method": "supernet"}, "No supernet can begin with a model of type vim"),
        ({"method": "train_images", "id": "more", "parent": "nowhere"}, "There is no classifier `nowhere`"),
    ):
        with pytest.raises(Problem, match=words):
            duramen.run(RECIPE | {"steps": [RECIPE["steps"][0], step]}, "new", out / "early")
        assert not (out / "early").exists(), "nothing was trained, and a better recipe may use the folder"


@pytest.mark.parametrize("kind", ["vim", "plainmamba"])
@torch.no_grad()
def test_a_head_for_every_place_works_on_what_is_left(kind):
    """Segmentation by a linear head, fitted in closed form: what a patch that left would have said is said by the nearest that stayed; better so than at random."""
    config, model = ARCHITECTURES[kind]
    torch.manual_seed(0)
    own = {"stem": None, "kernel_size": 3} if kind == "plainmamba" else {}
    network = model(
        config(hidden_size=32, num_hidden_layers=3, image_size=32, patch_size=4, num_labels=10, state_size=4, **own)
    ).eval()
    images, masks = shapes_with_masks(160, 32, seed=5)
    wanted = torch.nn.functional.avg_pool2d(masks[:, None].float(), 4)[:, 0] > 0.25
    pixels, scores = seen_by(network, images.values), []
    for reduction in (None, {"sites": [0, 1], "keep": [0.7]}, {"sites": [0, 1], "keep": [0.7], "kind": "random"}):
        network.config.reduction = reduction
        output = network(pixels)
        features = output.feature_map()
        assert features.shape == (160, 32, 8, 8)
        if reduction is None:
            cells = [place for place in range(output.last_hidden_state.shape[1]) if place != network.extra]
            assert torch.equal(features.flatten(2).transpose(1, 2), output.last_hidden_state[:, cells])
        else:
            assert output.last_hidden_state.shape[1] < 36
            stayed = [sum(int(place) != network.extra for place in row) for row in output.positions]
            assert all(len(row.unique()) == count for row, count in zip(output.representative, stayed, strict=True))
        rows = torch.cat([features, torch.ones_like(features[:, :1])], 1).permute(0, 2, 3, 1).flatten(1, 2).double()
        learned, unseen = rows[:120].flatten(0, 1), rows[120:].flatten(0, 1)
        gram = learned.T @ learned + 0.1 * torch.eye(33, dtype=torch.float64)
        head = torch.linalg.solve(gram, learned.T @ (2.0 * wanted[:120].flatten() - 1).double())
        said, truth = unseen @ head, wanted[120:].flatten()
        cut = said.sort().values[-int(truth.sum())]
        hit = (said >= cut) & truth
        scores.append(float(hit.sum() / ((said >= cut) | truth).sum()))
    dense, pruned, random = scores
    assert dense > pruned > max(random, 0.55 * dense), scores


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(40):
            Image.new("L", (8, 8)).save(tmp_path / "train" / name / f"{number}.png")
    labels = open_images(str(tmp_path), "train", size=8, channels=1).labels
    assert labels[:30].bincount(minlength=3).min() >= 3


def test_sixteen_bits_keep_their_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", 64, 1)[0, 0].tolist() == (ramp[0] >> 8).tolist()
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(Problem, match="nobody says which is white"):
        decode(tmp_path / "b.tif", 8, 1)


def test_classes_that_are_not_those_of_the_test_are_refused(tmp_path):
    place, recipe = files(tmp_path / "set"), RECIPE | {"images": RECIPE["images"] | {"data": str(tmp_path / "set")}}
    (place / "train" / "bird").mkdir()
    Image.new("L", (8, 8)).save(place / "train" / "bird" / "0.png")
    with pytest.raises(Problem, match="not of the same classes: bird"):
        duramen.run(recipe, "new", tmp_path / "out")
    (place / "test").rename(place / "val")
    with pytest.raises(Problem, match="has no folder `test`"):
        duramen.run(recipe, "new", tmp_path / "out")


def test_the_folder_of_another_run_is_not_taken_for_done(tmp_path):
    (tmp_path / "out" / ".duramen").mkdir(parents=True)
    (tmp_path / "out" / ".duramen" / "fingerprint.json").write_text("{}")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(Problem, match="holds another run"):
        duramen.run(RECIPE, "new", tmp_path / "out")
