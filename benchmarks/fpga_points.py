"""Claim: the three operating points that "Quasar-ViT" published for the ZCU102 lie among the modelled frame rates of networks of the sizes that it searched.

    python benchmarks/fpga_points.py

The paper's shapes, shares of eight bits and engines are not known to us, so that nothing can be predicted: this lists what the model says of networks at the corners of AutoFormer's spaces, for three shares, with the fastest engine that fits the
part. 150 MHz, 80 % of 19.2 GB/s, activations of six bits on the chip, attention at two products to a multiplier and one head at a time, norms, softmax and GELU beside it.
Writes benchmarks/results/fpga_points.csv. Seconds.
"""

from __future__ import annotations

import rows
from duramen.hardware.cost import Fpga, best_engine
from duramen.hardware.fpga import Engine, read_device
from duramen.vision import ElasticViTConfig
from duramen.vision.supernet import Space

NETWORKS = {
    "AutoFormer-T, smallest": (192, 12, 3, 3.5), "AutoFormer-T, largest": (240, 14, 4, 4.0), "AutoFormer-S, smallest": (320, 12, 5, 3.0),
    "AutoFormer-S, middle": (384, 13, 6, 3.5), "AutoFormer-S, largest": (448, 14, 7, 4.0),
}  # fmt: skip
SHARES = (0.0, 0.5, 1.0)


def main() -> None:
    """Models all of them."""
    device, config = read_device("zcu102"), ElasticViTConfig(num_labels=1000)
    found = []
    for name, (width, depth, heads, ratio) in NETWORKS.items():
        space = Space(widths=(width,), depths=(depth,), heads=(heads,), ratios=(ratio,))
        engine = best_engine(space.same(width, depth, heads, ratio, 0.5).parts(config), device, Engine())
        for share in SHARES:
            architecture = space.same(width, depth, heads, ratio, share)
            value = 1 / Fpga(device, engine).seconds(architecture.parts(config))
            case = f"ZCU102 {engine.lanes} by {engine.inputs} by {engine.tokens}, {share:.0%} of the rows"
            found.append(rows.row(case, "frames per second", "1/s", name, value))
            print(name, case, round(value, 1))
        found.append(rows.row("of an image", "multiply-adds", "G", name, architecture.products(config) / 1e9))
    rows.write("fpga_points", found)


if __name__ == "__main__":
    main()
