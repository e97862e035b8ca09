"""The engine as hardware: sums bit for bit and cycles of the model, in Verilator, on codes at their limits and on those of a real network."""

import numpy as np
import pytest

from duramen.hardware import simulation
from duramen.hardware.fpga import Engine
from duramen.hardware.simulation import DEPTH, Bench, lay
from duramen.problem import Problem
from duramen.vision.elastic import Architecture
from duramen.vision.export_images import Settings, engine_of, inputs_of, simulated
from duramen.vision.images import seen_by
from duramen.vision.vit_search import prepared
from test_supernet import IMAGES, supernet

ENGINES = {
    "four products, streamed": (Engine(lanes=6, inputs=8, streams=True), 96),
    "two products, streamed": (Engine(lanes=4, inputs=8, factor=2, activation_bits=8, streams=True), 32),
}
SHAPES = ((13, 21, 9, 0.5), (16, 16, 5, 1.0), (40, 48, 20, 0.3), (24, 7, 2, 0.0), (3, 2, 1, 0.0))
simulator = pytest.mark.skipif(simulation.shutil.which("c++") is None, reason="no C++ compiler for Verilator")


def product(rows, features, tokens, share, bits, draw):
    eight = draw.random(rows) < share
    codes = np.where(eight[:, None], draw.integers(-128, 128, (rows, features)), draw.integers(-8, 8, (rows, features)))
    inputs = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (features, tokens))
    codes[0], inputs[:, 0] = -128 if eight[0] else -8, -(2 ** (bits - 1))
    return codes, eight, inputs


@simulator
@pytest.mark.parametrize("name", ENGINES)
def test_sums_are_exact_and_cycles_as_modelled(name):
    (engine, bits), draw = ENGINES[name], np.random.default_rng(0)
    with Bench(engine, bits, (40, 48, 20)) as bench:
        for rows, features, tokens, share in SHAPES:
            codes, eight, inputs = product(rows, features, tokens, share, engine.activation_bits, draw)
            found = bench.run(codes, eight, inputs)
            assert np.array_equal(found.sums, codes @ inputs)
            longest = DEPTH if tokens > 4 else 2 * DEPTH  # a store that is shorter than the pipeline waits for it
            assert DEPTH <= found.cycles - found.modelled <= longest


@simulator
def test_a_real_network_runs_on_the_engine():
    alone = prepared(supernet(), Architecture(24, (2,), (2.0,), ((0.5, 0.25, 0.75, 0.5),)), IMAGES)
    inputs = inputs_of(alone, seen_by(alone, IMAGES.pixels([0])))
    rows = simulated(list(alone.linears()), inputs, Settings())
    assert [row["name"] for row in rows] == ["embed", *(f"layers.0.{site}" for site in ("qkv", "proj", "fc1", "fc2")), "head"]
    assert all(row["cycles"] == row["modelled"] + DEPTH for row in rows)
    assert {row["bits"] for row in rows} == {5, 6, 7, 8}


def test_the_engine_is_one_whose_multipliers_hold_the_products():
    for bits, factor in ((6, 4), (7, 2), (8, 2)):
        engine, _ = engine_of(bits, Settings())
        assert (engine.factor, engine.tokens, engine.activation_bits) == (factor, factor // 2, bits)


def test_rows_of_eight_bits_lie_on_pairs_and_come_first():
    codes = np.array([[-8, 7], [-128, 127], [3, -1], [17, -17]])
    laid = lay(codes, np.array([False, True, False, True]))
    assert laid.eight == 2
    assert laid.rows.tolist() == [1, 1, 3, 3, 0, 2]
    assert laid.lanes[:4].tolist() == [[0, 15], [-8, 7], [1, 15], [1, -2]]
    assert lay(codes[:1], np.array([False])).rows.tolist() == [0, -1]
    with pytest.raises(Problem, match="has the code 17"):
        lay(codes, np.array([False, True, False, False]))


def test_what_cannot_be_built_is_said(monkeypatch):
    with pytest.raises(Problem, match="no hardware description"):
        Bench(Engine(dsp_share=0.5), 64, (4, 4, 4))
    with pytest.raises(Problem, match="do not fit a multiplier"):
        Bench(Engine(activation_bits=7), 64, (4, 4, 4))
    monkeypatch.setattr(simulation, "_path", lambda: "")
    with pytest.raises(Problem, match="There is no Verilator"), Bench(Engine(), 64, (4, 4, 4)):
        pass


def test_what_went_wrong_is_said_and_not_the_warning_before_it(tmp_path):
    with pytest.raises(Problem, match="failed") as caught:
        simulation._ran(["/bin/sh", "-c", "echo a warning >&2; echo engine.sv:3: error: no such thing >&2; exit 2"], tmp_path)
    assert caught.value.why == "engine.sv:3: error: no such thing"
