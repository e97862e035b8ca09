"""Supernets: sub-networks against networks of their own, rows against their grids, whole numbers against every way to run them, and the search against all that it could have found."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import duramen
from duramen.hardware.cost import Fpga, Measured, best_engine
from duramen.hardware.fpga import Engine, read_device, resources
from duramen.problem import Problem
from duramen.quantize.learned import on_grid
from duramen.quantize.mixed_linear import InputStep, MixedLinear, widest_exact
from duramen.quantize.rows import EIGHT, FOUR, integer_product, row_gain
from duramen.search.team import team
from duramen.vision import export_images
from duramen.vision.cpu import session
from duramen.vision.elastic import Architecture, ElasticViTConfig, ElasticViTForImageClassification, materialise
from duramen.vision.images import seen_by, shapes
from duramen.vision.integers import graph_of
from duramen.vision.opening import load_classifier
from duramen.vision.studio import Studio
from duramen.vision.supernet import (
    Sandwich,
    Settings,
    Space,
    apply,
    begin_rounding,
    collect_grams,
    new_config,
    running,
    settle_inputs,
    sort_units,
    supernet_of,
)  # fmt: skip
from duramen.vision.vit_search import Search, evolve, front, prepared, target_of, with_share
from duramen.vision.vit_search import Settings as SearchSettings
from test_vit import KINDS, SHAPE, made

SMALL = {"widths": (16, 24), "depths": (1, 2), "heads": (1, 2), "ratios": (1.0, 2.0), "head_size": 8, "patch": 4}
IMAGES = shapes(96, 16, channels=1)


def supernet(rounding=True, **options):
    torch.manual_seed(0)
    network = ElasticViTForImageClassification(new_config(Settings(**SMALL | options), IMAGES)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "log_" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if rounding:
        begin_rounding(network, IMAGES)
    return network


def drawn(network, count, seed=0):
    generator, space = torch.Generator().manual_seed(seed), Space.model_validate(network.config.space)
    return [space.largest, space.smallest, *(space.draw(generator) for _ in range(count))]


def logits(network, images=IMAGES):
    return network(pixel_values=seen_by(network, images.pixels(range(8)))).logits


@pytest.mark.parametrize("rounding", [False, True])
@torch.no_grad()
def test_a_sub_network_is_what_it_is_alone(rounding, tmp_path):
    network = supernet(rounding)
    for architecture in drawn(network, 6):
        alone = materialise(network, architecture)
        with running(network, architecture):
            assert torch.equal(logits(network), logits(alone))
        assert alone.config.architecture == architecture
    alone.save_pretrained(tmp_path)
    assert torch.equal(logits(load_classifier(tmp_path).cpu()), logits(alone))


def test_rows_of_eight_bits_are_nested():
    matrix = MixedLinear(16, 24, 6, parts=3)
    matrix.gain.copy_(torch.randn(24, generator=torch.Generator().manual_seed(0)))
    for outputs in (12, 18, 24):
        chosen = [matrix.eight_rows(outputs, share) for share in (0, 0.25, 0.5, 0.75, 1)]
        for fewer, more in itertools.pairwise(chosen):
            assert not (fewer & ~more).any()
        assert not chosen[0].any()
        assert torch.equal(chosen[-1], matrix.taken(matrix.gain, outputs) > 0)
    narrow, wide = matrix.eight_rows(12, 0.5), matrix.eight_rows(24, 0.5)
    inside = matrix.taken(wide, 12)
    assert not (narrow & ~inside).any() or not (inside & ~narrow).any()


def test_gradients_are_those_of_learned_steps_at_both_widths():
    torch.manual_seed(0)
    matrix, x = MixedLinear(12, 6, 6), torch.randn(5, 12)
    torch.nn.init.normal_(matrix.weight)
    matrix.gain.copy_(torch.tensor([1.0, 2.0, 3.0, -1.0, 0.5, 0.1]))
    target = torch.randn(5, 6)
    loss = ((matrix(x, 6, 0.5, rounding=True) - target) ** 2).sum()
    loss.backward()
    eight = matrix.eight_rows(6, 0.5)
    assert eight.tolist() == [True, True, True, False, False, False]
    assert (matrix.log_gamma.grad[0] != 0).tolist() == (~eight).tolist()
    assert (matrix.log_gamma.grad[1] != 0).tolist() == eight.tolist()
    other, size = matrix.weight.detach().clone().requires_grad_(), matrix.weight.detach().square().mean(1).sqrt()
    steps = [(each.exp() * size)[:, None].detach().requires_grad_() for each in matrix.log_gamma]
    rounded = torch.where(eight[:, None], on_grid(other, steps[1], None, EIGHT), on_grid(other, steps[0], None, FOUR))
    unit = matrix.inputs.step().detach()
    seen = (x / unit).clamp(-32, 31).round() * unit
    ((seen @ rounded.T + matrix.bias.detach() - target) ** 2).sum().backward()
    torch.testing.assert_close(matrix.weight.grad, other.grad, rtol=1e-4, atol=1e-4)
    for number, step in enumerate(steps):
        torch.testing.assert_close(matrix.log_gamma.grad[number], (step.grad * step.detach())[:, 0], rtol=1e-3, atol=1e-4)


def test_a_row_learns_at_both_numbers_of_bits():
    matrix = MixedLinear(8, 2, 6)
    torch.nn.init.normal_(matrix.weight)
    grads = []
    for share in (0.0, 1.0):
        matrix.zero_grad()
        matrix(torch.randn(3, 8), 2, share, rounding=True).square().sum().backward()
        grads.append(matrix.weight.grad.clone())
    assert all(grad.abs().sum() > 0 for grad in grads)


@torch.no_grad()
def test_the_order_of_rows_is_by_gain_and_steps_are_no_worse_than_gaussian():
    network = supernet(rounding=False)
    grams = collect_grams(network, IMAGES)
    matrix, gram = network.layers[0].fc1, grams["layers.0.fc1"].float()

    def error(share):
        chosen = matrix.chosen(matrix.weight.shape[1], len(matrix.weight), share)
        apart = matrix.weight - chosen.codes * chosen.steps[:, None]
        return float(((apart @ gram) * apart).sum())

    before = [error(share) for share in (0.0, 1.0)]
    begin_rounding(network, IMAGES)
    assert torch.allclose(matrix.gain, row_gain(matrix.weight, gram), rtol=1e-4)
    after = [error(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert after[0] <= before[0] * 1.001
    assert after[-1] <= before[1] * 1.001
    assert after == sorted(after, reverse=True)


@torch.no_grad()
def test_every_way_to_run_it_gives_the_same_bits():
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("qonnx")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    network = supernet()
    architecture = Architecture(24, (2, 1), (2.0, 1.0), ((0.5, 0.25, 0.75, 0.5), (0.0, 1.0, 0.5, 0.25)))
    alone = prepared(network, architecture, IMAGES)
    pixels = seen_by(alone, IMAGES.pixels(range(5)))
    said = alone(pixel_values=pixels).logits
    plain, _ = graph_of(alone, "onnx")
    onnx.checker.check_model(plain, full_check=True)
    session = onnxruntime.InferenceSession(plain.SerializeToString())
    found = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
    assert torch.allclose(found, said, atol=1e-5 * float(said.abs().max()))
    model, taps = graph_of(alone, "qonnx", 1)
    wrapped = ModelWrapper(model).transform(InferShapes())
    inside = execute_onnx(wrapped, {"pixel_values": pixels[:1].numpy()}, return_full_exec_context=True)
    mixed_rows = 0
    for name, matrix, share, _ in alone.linears():
        before, after = (torch.from_numpy(inside[tap].copy()) for tap in taps[name])
        mixed, step, bias = matrix.integers(share)
        codes = (before / step).round().clamp(-32, 31)
        expected = integer_product(mixed, codes.long(), step, bias)
        assert torch.equal(after, expected), name
        assert torch.equal(matrix(before, len(bias), share, rounding=True), expected), name
        mixed_rows += 4 < mixed.bits < 8
    assert mixed_rows >= 5


@torch.no_grad()
def test_maps_of_eight_bits_are_those_of_the_network():
    """Codes up to 255 in the integer products of ONNX Runtime."""
    network = supernet(activation_bits=8)
    pixels = seen_by(network, IMAGES.pixels(range(8)))
    given = session(graph_of(network, "onnx")[0]).run(None, {"pixel_values": pixels.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), network(pixel_values=pixels).logits, rtol=0, atol=1e-4)


def test_layer_scales_fold_into_steps_and_biases():
    alone = prepared(supernet(), Architecture(24, (2,), (2.0,), ((0.5,) * 4,)), IMAGES)
    for name, matrix, share, scale in alone.linears():
        x = torch.randn(3, matrix.weight.shape[1])
        codes = (x / matrix.inputs.step()).round().clamp(-32, 31).long()
        plain, folded = (
            integer_product(mixed, codes, step, bias)
            for mixed, step, bias in (matrix.integers(share), matrix.integers(share, scale))
        )
        expected = plain if scale is None else plain * scale
        assert torch.allclose(folded, expected, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
@torch.no_grad()
def test_a_pretrained_transformer_is_the_largest_sub_network(kind):
    network = made(kind)
    if kind == "dinov2":
        network.classifier.weight[:, 16:] = 0
    images, space = (
        shapes(64, 16),
        Space(widths=(8, 16), depths=(2, 3), heads=(1, 2), ratios=(1.0, network.config.mlp_ratio if kind == "dinov2" else 2.0)),
    )
    network.config.id2label = {number: f"class {number}" for number in range(network.config.num_labels)}
    found = supernet_of(network, space, images, bits=6)
    assert found.config.id2label == network.config.id2label
    pixels = seen_by(network, images.pixels(range(6)))
    assert torch.allclose(found(pixel_values=pixels).logits, network(pixel_values=pixels).logits, atol=1e-4)
    with pytest.raises(Problem, match="32 channels"):
        supernet_of(network, space.model_copy(update={"widths": (32,)}), images, bits=6)


@torch.no_grad()
def test_what_puts_out_most_comes_first():
    network = supernet(rounding=False)
    layer = network.layers[0]
    layer.fc2.weight[:, 5] *= 50
    layer.proj.weight[:, 8:] *= 50
    before, row = logits(network), layer.fc1.weight[5].clone()
    head = layer.qkv.weight[8:16].clone()
    sort_units(network, collect_grams(network, IMAGES))
    assert torch.allclose(logits(network), before, atol=1e-4)
    assert torch.allclose(layer.fc1.weight[0].sort().values, row.sort().values)
    assert torch.allclose(layer.qkv.weight[:8].sort().values, head.sort().values)


def studio(folder, network=None, told=lambda step, loss: None):
    parts = IMAGES.part(torch.arange(64)), IMAGES.part(torch.arange(64, 96))
    return Studio(network, None, *parts, parts[1], memo=lambda name, compute: compute(), folder=folder, out=folder, told=told)


def test_training_goes_on_to_the_same_bits(tmp_path):
    options = Settings(**SMALL, alone_steps=2, steps=4, rounding_steps=4, every=2, batch=16, at_once=16)
    whole = studio(tmp_path / "whole")
    record = apply(whole, options)
    assert [each["name"] for each in record["trainings"]] == ["the largest", "all in floats", "all rounded"]
    assert record["multiply_adds"]["smallest"] < record["multiply_adds"]["largest"]

    def stop_at(count):
        calls = itertools.count()

        def told(step, loss):
            if next(calls) == count:
                raise KeyboardInterrupt

        return told

    for count in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            apply(studio(tmp_path / "stopped", told=stop_at(count)), options)
    again = studio(tmp_path / "stopped")
    apply(again, options)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


def test_smaller_networks_learn_from_the_largest_and_it_not_from_them():
    network = supernet(rounding=False)
    task = Sandwich(network, IMAGES, IMAGES, sampled=0)
    pixels, labels = task.batch([1, 2, 100])
    last = network.layers[1].fc1.weight
    task.loss([1, 2, 100]).backward()
    found, first = last.grad.clone(), network.layers[0].fc1.weight.grad.clone()
    network.zero_grad()
    cross_entropy(network(pixel_values=seen_by(network, pixels)).logits, labels, reduction="sum").backward()
    assert torch.equal(found, last.grad)
    assert not torch.allclose(first, network.layers[0].fc1.weight.grad)
    more = Sandwich(network, IMAGES, IMAGES, sampled=2)
    assert torch.equal(more.loss([3, 4]), more.loss([3, 4]))
    with torch.no_grad():
        terms = task.held_out()
    assert set(terms) == {"loss", "wrong", "wrong by the smallest"}


TARGET = Fpga(read_device("zcu102"), Engine(lanes=16, inputs=8))


def search(network, most, settings, **space):
    whole = Space.model_validate(network.config.space).model_copy(update=space)
    return Search(network, whole, TARGET, most, IMAGES, IMAGES, settings)


def test_shares_are_the_best_of_all():
    network = supernet()
    settings = SearchSettings(target=1, images=16)
    found = search(network, 1.0, settings, depths=(1,), shares=(0.0, 0.5, 1.0))
    found.losses = [[0.3, 0.1, 0.25, 0.2]] * 2
    base = replace(found.space.largest, eight=((0.0,) * 4,))
    fast, slow = found.seconds(base), found.seconds(replace(base, eight=((1.0,) * 4,)))
    found.most = fast + 0.55 * (slow - fast)

    def lost(architecture):
        return sum(
            found.losses[0][site] * found._left(base, 0, site, [share])[0] for site, share in enumerate(architecture.eight[0])
        )

    every = [replace(base, eight=(each,)) for each in itertools.product((0.0, 0.5, 1.0), repeat=4)]
    best = min(lost(each) for each in every if found.seconds(each) <= found.most)
    chosen = found.best_shares(base)
    assert found.seconds(chosen) <= found.most
    assert lost(chosen) == pytest.approx(best)
    found.most = fast * 0.999
    assert found.best_shares(base) is None
    smaller = found.repaired(base)
    assert found.seconds(smaller) <= found.most
    assert smaller != base


def pretended(architecture):
    """A loss with a known best: layers want different things, and the time that they take is scarce."""
    worth = 2.0 * architecture.width / 24 + sum(
        (2 - number) * heads + (1 + number) * ratio + sum(eight)
        for number, (heads, ratio, eight) in enumerate(
            zip(architecture.heads, architecture.ratios, architecture.eight, strict=True)
        )
    )
    return {"loss": 10 - worth / 4, "wrong": 0.5}


def test_evolution_beats_chance_and_always_keeps_the_target(monkeypatch):
    network = supernet()
    monkeypatch.setattr(Search, "measure", lambda self, architectures: [pretended(each) for each in architectures])
    wins = 0
    for seed in range(5):
        options = {"target": 1, "population": 12, "parents": 4, "mutants": 6, "children": 6, "seed": seed}
        evolved = search(network, 0.0, SearchSettings(**options, generations=6))
        evolved.most = 0.6 * evolved.seconds(evolved.space.largest)
        tried = evolve(evolved, lambda name, compute: compute(), lambda number, loss: None)
        assert all(each["seconds"] <= evolved.most for each in tried)
        assert len({str(each["architecture"]) for each in tried}) == len(tried)
        alone = search(network, evolved.most, SearchSettings(**options | {"population": len(tried)}, generations=0))
        alone.losses = evolved.losses
        generator = torch.Generator().manual_seed(100 + seed)
        chance = alone.distinct((), (alone.space.draw(generator) for _ in range(1000)), len(tried), ())
        wins += min(each["loss"] for each in tried) <= min(pretended(each)["loss"] for each in chance)
        best = min(tried, key=lambda each: each["loss"])
        assert front(tried)[-1]["loss"] == best["loss"]
        losses = [each["loss"] for each in front(tried)]
        assert losses == sorted(losses, reverse=True)
    assert wins >= 4


def test_search_goes_on_where_it_stopped(monkeypatch):
    network, kept = supernet(), {}
    options = SearchSettings(target=1, population=4, generations=2, parents=2, mutants=2, children=2, images=8)
    measured = []

    def measure(self, architectures):
        measured.extend(architectures)
        return [pretended(each) for each in architectures]

    monkeypatch.setattr(Search, "measure", measure)

    def memo(stops, name, compute):
        if name == stops:
            raise KeyboardInterrupt
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    with pytest.raises(KeyboardInterrupt):
        evolve(search(network, 1.0, options), partial(memo, "generation-0002"), lambda number, loss: None)
    before = len(measured)
    found = evolve(search(network, 1.0, options), partial(memo, "never"), lambda number, loss: None)
    again = len(measured) - before
    whole = evolve(search(network, 1.0, options), lambda name, compute: compute(), lambda number, loss: None)
    assert [each["architecture"] for each in found] == [each["architecture"] for each in whole]
    assert len(measured) == before + again + before + again


def test_engines_fit_and_none_is_faster():
    network, device = supernet(), read_device("zcu102")
    parts = Space.model_validate(network.config.space).largest.parts(network.config)
    engine = best_engine(parts, device, Engine())
    assert not resources([shape for part in parts for shape in part], engine).over(device)
    best = Fpga(device, engine)
    for lanes, inputs in itertools.product((16, 32, 64), repeat=2):
        other = Fpga(device, replace(engine, lanes=lanes, inputs=inputs, factor=4, tokens=2))
        assert other.excess(parts) or best.cycles(parts) <= other.cycles(parts)
    told = best.describe(parts)
    assert sum(each["seconds"] for each in told["products"]) == pytest.approx(best.seconds(parts))
    tiny = device.model_copy(update={"ramb36": 1})
    with pytest.raises(Problem, match="No engine"):
        best_engine(parts, tiny, Engine())


def test_a_table_adds_up_and_times_each_part_once():
    network, timed = supernet(), []
    table = Measured("here", lambda parts: timed.extend(parts) or list(map(float, map(len, parts))), rest=0.5)
    architecture = Architecture(16, (1, 1), (1.0, 1.0), ((0.0,) * 4, (1.0,) * 4))
    parts = architecture.parts(network.config)
    assert table.seconds(parts) == 0.5 + 1 + 2 * (4 + 2) + 1
    assert len(timed) == 4
    table.seconds(parts)
    assert len(timed) == 4
    assert sum(each["seconds"] for each in table.describe(parts)["products"]) == table.seconds(parts) - 0.5


def test_workers_end_with_the_same_networks(tmp_path):
    network, settings = (
        supernet(),
        SearchSettings(target=1, images=16, population=4, generations=1, mutants=2, children=2, parents=2),
    )
    alone, shared = search(network, 1.0, settings), search(network, 1.0, settings)
    expected = evolve(alone, studio(tmp_path / "alone", network).memo, lambda number, loss: None)
    with team(lambda: shared.heirs, 2, "", torch.device("cpu")) as shared.team:
        assert evolve(shared, studio(tmp_path / "shared", network).memo, lambda number, loss: None) == expected
    assert shared.losses == alone.losses
    with pytest.raises(Problem, match="nothing to do"):
        duramen.run(RECIPE | {"steps": RECIPE["steps"][3:4]}, "new", tmp_path / "no", workers=2)


def test_what_cannot_be_is_said(tmp_path):
    network, here = supernet(), studio(tmp_path, supernet()).memo
    space = Space.model_validate(network.config.space)
    with pytest.raises(Problem, match="No sub-network reaches 10,000,000"):
        duramen.vision.vit_search.apply(studio(tmp_path, network), SearchSettings(target=1e7))
    with pytest.raises(Problem, match="no supernet"):
        duramen.vision.vit_search.apply(studio(tmp_path, materialise(network, space.smallest)), SearchSettings(target=1))
    with pytest.raises(Problem, match="does not fit zcu102"):
        target_of(SearchSettings(target=1, lanes=512, inputs=512), network, space, here)
    with pytest.raises(ValueError, match="of one engine"):
        SearchSettings(target=1, lanes=32)
    wide = copy.deepcopy(network)
    wide.config.activation_bits = 8
    with pytest.raises(Problem, match="4 products of 4 by 8 bits"):
        target_of(SearchSettings(target=1, lanes=64, inputs=64), wide, space, here)
    assert target_of(SearchSettings(target=1), wide, space, here).engine.factor == 2
    assert widest_exact(6) == 4096
    with pytest.raises(Problem, match="not exact in float32"):
        ElasticViTForImageClassification(ElasticViTConfig(hidden_size=64, heads=[1], hidden=[8192], eight=[[1.0] * 4]))


def test_steps_of_activations_are_near_the_best():
    step = InputStep(4)
    values = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    step.seen = []
    step.look(values)
    step.settle()
    errors = []
    for factor in (0.7, 1.0, 1.4):
        unit = step.step().detach() * factor
        errors.append(float(((values / unit).round().clamp(-8, 7) * unit - values).square().sum()))
    assert errors[1] == min(errors)
    maps = InputStep(4, signed=False)
    maps.seen = []
    maps.look(torch.rand(200))
    maps.settle()
    assert float(maps.step().detach()) == pytest.approx(1 / 15, rel=0.2)
    empty = supernet(rounding=False)
    settle_inputs(empty, IMAGES, 4)
    assert all(module.seen is None for module in empty.modules() if isinstance(module, InputStep))


def test_gradients_of_a_step_add_up_however_a_batch_is_divided():
    step, inputs = InputStep(4), torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for at_once in (6, 2, 1):
        step.zero_grad()
        for part in inputs.split(at_once):
            codes, unit = step(part)
            (codes * unit).square().sum().backward()
        found.append(float(step.log_step.grad))
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)


def test_one_share_changes_one_matrix():
    base = Space(**{key: SMALL[key] for key in ("widths", "depths", "heads", "ratios")}).largest
    other = with_share(base, 1, 2, 0.25)
    assert other.eight[1][2] == 0.25
    assert with_share(other, 1, 2, 1.0) == base


RECIPE = {
    "name": "tiny",
    "images": {"data": "shapes", "size": 16, "channels": 1, "train": 128, "test": 32},
    "steps": [
        {"method": "supernet", **{key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()}, "alone_steps": 1, "steps": 2, "rounding_steps": 2, "every": 2, "batch": 16, "at_once": 16},
        {"method": "vit_search", "target": 300000, "population": 4, "generations": 1, "mutants": 2, "children": 2, "parents": 2, "images": 8},
        {"method": "train_images", "steps": 1, "every": 1, "batch": 8, "at_once": 8},
        {"method": "evaluate_images", "batches": [1]},
        {"method": "export_images"},
    ],
}  # fmt: skip


def test_from_nothing_to_a_network_on_a_target(tmp_path):
    found = duramen.run(RECIPE, "new", tmp_path / "out")
    searched, tuned = found["steps"][1]["search"], found["steps"][2]["trainings"][0]
    assert tuned["distilled"]
    assert 1 / searched["chosen"]["seconds"] >= 300000
    assert searched["described"]["takes"]["dsps"] <= searched["described"]["there"]["dsps"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The network that was found" in page
    assert "lookup tables" in page
    network = load_classifier(tmp_path / "out")
    plain, proved = found["exports"]
    assert plain["same_answers"] == 1
    assert plain["equal_matrices"] == proved["equal_matrices"] == 2 + 4 * network.config.architecture.depth
    codes = load_file(tmp_path / "out" / "exports" / "codes.safetensors")
    assert torch.equal(
        codes["layers.0.fc1.codes"].float() * codes["layers.0.fc1.steps"][:, None],
        network.layers[0].fc1.integers(network.config.eight[0][2])[0].weight(),
    )
    assert "all 6 matrices" in page or "all 10 matrices" in page
    assert network.config.architecture == Architecture.read(searched["chosen"]["architecture"])
    assert "change" in found["evaluations"][0]
    with pytest.raises(Problem, match="no step"):
        duramen.run(RECIPE | {"steps": [{"method": "vit_search", "target": 1}, {"method": "rtn"}]}, "new", tmp_path / "no")


def test_what_a_later_step_refuses_is_said_before_a_supernet_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(duramen.vision.supernet, "train_classifier", None)
    kind, model = KINDS["vit"]
    model(kind(**SHAPE | {"num_labels": 10})).save_pretrained(tmp_path / "vit")
    begun, searched = RECIPE["steps"][:2]
    for model, steps, said in (
        ("new", [begun, searched | {"target": 1e7}], "No sub-network reaches 10,000,000"),
        ("new", [begun, searched | {"device": "zcu103"}], "There is no device `zcu103`"),
        ("new", [begun, searched, {"method": "export_images", "simulate": ["layer.0.*"]}], "No matrix is called"),
        ("new", [begun, searched, {"method": "export_images", "simulate": ["head"], "device": "x"}], "There is no device `x`"),
        (str(tmp_path / "vit"), [begun, searched], "The space has 24 channels, and the model 16"),
        (
            str(tmp_path / "vit"),
            [begun | {"widths": [8], "depths": [1], "heads": [1], "ratios": [1.0]}, searched | {"target": 1e7}],
            "No sub-network reaches",
        ),
    ):
        with pytest.raises(Problem, match=said):
            duramen.run(RECIPE | {"steps": steps}, model, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_export_that_says_something_else_is_refused(tmp_path, monkeypatch):
    network = prepared(supernet(), Architecture(24, (2,), (2.0,), ((0.5, 0.25, 0.75, 0.5),)), IMAGES)
    there = studio(tmp_path, network)
    found, _ = export_images.apply(there, export_images.Settings())
    assert found["equal_matrices"] == 6

    def damaged(damage):
        def graph(network, *args):
            other = copy.deepcopy(network)
            damage(other)
            return graph_of(other, *args)

        monkeypatch.setattr(export_images, "graph_of", graph)

    damaged(lambda network: network.layers[0].fc1.bias.data[3].add_(1e-3))
    with pytest.raises(Problem, match=r"layers\.0\.fc1 gives other bits in ONNX Runtime"):
        export_images.apply(there, export_images.Settings())
    damaged(lambda network: network.norm.weight.data.mul_(-1))
    with pytest.raises(Problem, match="its logits differ by"):
        export_images.apply(there, export_images.Settings())
