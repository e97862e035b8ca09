"""The model of an FPGA: packing against all operands, cycles against simulation and the sheet's tables, resources within the part."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.hardware.fpga import (
    Engine,
    Resources,
    Shape,
    Tiles,
    closed_cycles,
    frames_per_second,
    memory_blocks,
    network_cycles,
    read_device,
    resources,
    simulated_cycles,
    tiles,
    transformer_shapes,
)  # fmt: skip
from duramen.hardware.packing import (
    FOR_SUMS,
    SIGNED,
    UNSIGNED,
    best_packing,
    layout,
    packing_table,
    port_bits,
    product_range,
    signed_range,
    split_code,
    summable,
)  # fmt: skip
from duramen.problem import Problem

PORTS = (27, 18)
DEIT = {"tiny": (192, 12, 3, 768), "small": (384, 12, 6, 1536), "base": (768, 12, 12, 3072)}


def test_every_code_splits_and_joins():
    for code in range(-128, 128):
        high, low = split_code(code)
        assert SIGNED[0] <= high <= SIGNED[1]
        assert UNSIGNED[0] <= low <= UNSIGNED[1]
        assert all(16 * x * high + x * low == x * code for x in (-32, -1, 0, 31))


def taken_apart(sums, spacing, fields):
    """Signed fields of an integer, the lowest first; each borrows from the one above."""
    found = []
    for _ in range(fields):
        low = ((sums + 2 ** (spacing - 1)) % 2**spacing) - 2 ** (spacing - 1)
        found.append(low)
        sums = (sums - low) >> spacing
    return found


@pytest.mark.parametrize("kinds", list(itertools.product((SIGNED, UNSIGNED), repeat=2)), ids=str)
@pytest.mark.parametrize("bits", [4, 5, 6])
def test_four_products_in_one_multiplier_for_all_operands(kinds, bits):
    spacing = packing_table(4, bits, PORTS)[0].spacing
    weights = [np.arange(low, high + 1) for low, high in kinds]
    activations = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    w0, w1, a0, a1 = (each.ravel() for each in np.meshgrid(*weights, activations, activations, indexing="ij"))
    packed = (w0 + w1 * 2**spacing) * (a0 + a1 * 2 ** (2 * spacing))
    for found, expected in zip(taken_apart(packed, spacing, 4), (w0 * a0, w1 * a0, w0 * a1, w1 * a1), strict=True):
        assert (found == expected).all()


def test_which_layouts_fit():
    assert {bits: [(each.spacing, each.sums) for each in packing_table(4, bits, PORTS)] for bits in range(4, 9)} == {
        4: [(8, 1), (9, 2), (10, 4), (11, 8)], 5: [(9, 1), (10, 2)], 6: [(10, 1)], 7: [], 8: [],
    }  # fmt: skip
    assert [(each.spacing, each.sums) for each in packing_table(3, 6, PORTS)] == [(10, 1), (11, 2)]
    assert best_packing(4, 4, PORTS).sums == 8
    assert layout(4, 6, 9, PORTS) is None
    assert summable(9, product_range(SIGNED, signed_range(6))) == 0, "(-8)(-32) = 256 leaves the field"
    assert summable(9, product_range(SIGNED, (-31, 31))) == 1
    assert summable(10, product_range(UNSIGNED, (0, 63))) == 0, "unsigned activations break it"
    assert port_bits([(SIGNED, 0), (SIGNED, 10)]) == 15
    assert port_bits([(signed_range(6), 0), (signed_range(6), 20)]) == 27
    with pytest.raises(Problem, match="4 products of 4 by 7 bits do not fit a multiplier of 27 by 18") as found:
        best_packing(4, 7, PORTS)
    assert "at most 6 bits" in found.value.fix


def test_whole_dot_products_inside_the_accumulator():
    """The bounds are tight: one more product leaves the field."""
    signed, six, softmax = SIGNED, signed_range(6), (0, 63)
    for spacing, one, other, most in (
        (FOR_SUMS, UNSIGNED, six, 4369), (FOR_SUMS, signed, six, 8191), (20, six, six, 511), (20, six, softmax, 260),
    ):  # fmt: skip
        low, high = product_range(one, other)
        assert summable(spacing, (low, high)) == most
        field = range(-(2 ** (spacing - 1)), 2 ** (spacing - 1))
        assert all(most * each in field for each in (low, high))
        assert not all((most + 1) * each in field for each in (low, high))


@given(*(st.integers(1, 9) for _ in range(2)), *(st.integers(0, 40) for _ in range(3)), st.booleans())
@settings(max_examples=3000, deadline=None)
def test_the_closed_form_is_the_simulation(rows, columns, load, compute, store, prefetch):
    cut = Tiles(rows, columns, load, max(compute, 1), store)
    assert closed_cycles(cut, prefetch=prefetch) == simulated_cycles(cut, prefetch=prefetch)


@pytest.mark.parametrize(
    ("shape", "lanes", "inputs", "bits", "cut", "cycles", "without"),
    [
        (Shape(384, 384, 197, 0.5), 64, 32, 1024, (9, 12, 45, 99, 74), 10811, 11171),
        (Shape(1152, 384, 197, 0.25), 96, 48, 1024, (15, 8, 74, 99, 111), 12065, 13101),
        (Shape(384, 1536, 197, 0.0), 64, 64, 1024, (6, 24, 90, 99, 74), 14420, 14870),
        (Shape(192, 768, 197, 1.0), 64, 32, 256, (6, 24, 180, 99, 296), 26315, 26810),
    ],
)
def test_cycles_of_the_sheet(shape, lanes, inputs, bits, cut, cycles, without):
    engine = Engine(lanes=lanes, inputs=inputs, streams=True)
    found = tiles(shape, engine, bits)
    assert (found.rows, found.columns, found.load, found.compute, found.store) == cut
    assert closed_cycles(found) == cycles
    assert closed_cycles(found, prefetch=False) == without


@pytest.mark.parametrize(
    ("name", "eight", "cycles"),
    [
        ("tiny", 0.0, 195142), ("tiny", 0.5, 269986), ("tiny", 1.0, 323446), ("small", 0.0, 645862), ("small", 0.5, 902470),
        ("small", 1.0, 1159078), ("base", 0.0, 2317126), ("base", 0.5, 3343558), ("base", 1.0, 4369990),
    ],
)  # fmt: skip
def test_cycles_of_whole_networks(name, eight, cycles):
    shapes, device = transformer_shapes(*DEIT[name], eight=eight), read_device("zcu102")
    assert sum(shape.products for shape in shapes) / 1e9 == pytest.approx(
        {"tiny": 1.254, "small": 4.599, "base": 17.564}[name], abs=5e-4
    )
    assert Engine().bits_per_cycle(device) == 819
    assert network_cycles(shapes, Engine(), 819) == cycles
    assert frames_per_second(shapes, Engine(), device) == pytest.approx(150e6 / cycles)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 300), st.floats(0, 1), st.integers(100, 2000))
@settings(max_examples=300, deadline=None)
def test_more_work_never_takes_less_and_never_less_than_its_products(rows, features, tokens, eight, bits):
    engine = Engine(lanes=32, inputs=16, streams=True)

    def cycles(shape, speed=bits):
        return closed_cycles(tiles(shape, engine, speed))

    base = cycles(Shape(rows, features, tokens, eight))
    for more in (
        Shape(rows + 7, features, tokens, eight), Shape(rows, features + 7, tokens, eight), Shape(rows, features, tokens + 7, eight),
        Shape(rows, features, tokens, min(1.0, eight + 0.2)),
    ):  # fmt: skip
        assert cycles(more) >= base
    assert cycles(Shape(rows, features, tokens, eight), bits + 100) <= base
    halves = int(eight * rows + 0.5) + rows
    assert base >= halves * features * tokens / (engine.lanes * engine.inputs * engine.tokens)


def test_resources_grow_with_the_engine_and_fit_the_part():
    shapes, device = transformer_shapes(*DEIT["small"]), read_device("zcu102")
    base = resources(shapes, Engine())
    assert base.dsps == 2048
    assert base.over(device) == []
    for more in (Engine(lanes=96), Engine(inputs=96), Engine(tokens=4)):
        other = resources(shapes, more)
        assert (other.dsps, other.luts, other.flip_flops) > (base.dsps, base.luts, base.flip_flops)
        assert "multipliers of 2,268" in other.over(device)[0]
    tables = resources(shapes, Engine(lanes=32, inputs=32, dsp_share=0.0))
    assert tables.dsps == 0
    assert tables.luts > resources(shapes, Engine(lanes=32, inputs=32)).luts
    for width, depth in itertools.product((1, 9, 36, 100, 768), (1, 512, 1000, 5000)):
        assert memory_blocks(width, depth) <= memory_blocks(width + 1, depth)
        assert memory_blocks(width, depth) <= memory_blocks(width, depth + 1)
    assert memory_blocks(72, 512) == memory_blocks(36, 1024) == memory_blocks(1, 32768) == 1
    assert Resources(1, 1, 1, 913).over(device) == ["913 blocks of memory of 912"]


def test_a_device_file_with_a_missing_field_names_it(tmp_path):
    whole = read_device("zcu102").model_dump(mode="json")
    for name, value in (("dsps", None), ("luts", -3), ("more", 1)):
        changed = {key: each for key, each in whole.items() if key != name} | ({} if value is None else {name: value})
        (tmp_path / "part.json").write_text(json.dumps(changed))
        with pytest.raises(Problem, match=f"does not describe a device: `{name}`"):
            read_device(str(tmp_path / "part.json"))
    with pytest.raises(Problem, match="no device `zcu999`") as found:
        read_device("zcu999")
    assert "zcu102" in found.value.why
