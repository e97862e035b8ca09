"""Claim: the engine's hardware takes the modelled cycles, and its sums are those of whole numbers, on matrices and activations of a trained network.

    python benchmarks/engine_cycles.py

Takes the middle of the supernet of ``benchmarks/quasar.py`` out, and runs three of its matrices through the simulated engine in three sizes, with a test image's activations. A sum that differs ends it.
Writes benchmarks/results/engine_cycles.csv. About three minutes, most of them to compile.
"""

from __future__ import annotations

import rows
from duramen.vision.elastic import Architecture
from duramen.vision.export_images import Settings, inputs_of, simulated
from duramen.vision.images import seen_by
from duramen.vision.vit_search import prepared
from quasar import images, supernet

SIZES = ((16, 16), (32, 8), (16, 32))
MATRICES = ("layers.0.qkv", "layers.2.fc1", "layers.4.fc2")
MIDDLE = Architecture(96, (2, 3, 4, 3, 2), (3.0, 2.0, 3.0, 4.0, 3.0), ((0.25, 0.5, 0.75, 0.5),) * 5)


def main() -> None:
    """Simulates all of them."""
    train, aside = images()
    network = prepared(supernet((train, aside)), MIDDLE, train)
    given = inputs_of(network, seen_by(network, aside.pixels([0])))
    chosen = [each for each in network.linears() if each[0] in MATRICES]
    found = []
    for lanes, inputs in SIZES:
        for each in simulated(chosen, given, Settings(lanes=lanes, inputs=inputs)):
            case = "{} by {} by {} at {:.2f} bits".format(*each["shape"], each["bits"])
            print(lanes, inputs, each)
            found.append(
                rows.row(
                    case,
                    "cycles",
                    "1",
                    f"{lanes} by {inputs} lanes, simulated",
                    each["cycles"],
                    peer="modelled",
                    peer_value=each["modelled"],
                )
            )
            found.append(rows.row(case, "cycles", "1", f"{lanes} by {inputs} lanes, modelled", each["modelled"]))
    rows.write("engine_cycles", found)


if __name__ == "__main__":
    main()
