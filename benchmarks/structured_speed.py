"""Claim: a cut model is as much faster as it has fewer multiply-adds, or nearly.

    python benchmarks/structured_speed.py

Cuts a share of the block parameters of SmolLM2-135M (speed depends on shapes alone, so the units are taken by index) and measures prefill of 256 tokens and
greedy decoding in plain transformers, dense and cut in turn, in float32. Writes benchmarks/results/structured_speed.csv with the share of the multiply-adds that
is left, and prints a profile of both at 50 %. About 5 minutes on 2 cores; leave the machine idle.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import rows
from duramen.assets import open_model
from duramen.evaluate.speed import latency, memory_bytes
from duramen.families.model import BlockModel
from duramen.shrink.groups import find_units
from duramen.shrink.model import ShrinkSettings
from duramen.shrink.surgery import Surgery, shrunk
from structured_quality import planned

FAMILIES = {"FFN channels": ("ffn_channel",), "FFN channels and KV groups": ("ffn_channel", "kv_group")}
UNITS = {"prefill_seconds": "s", "decode_tokens_per_second": "1/s"}


def main() -> None:
    """Runs the table."""
    folder, table = open_model("smollm2-135m"), []
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    model = BlockModel.from_module(dense)
    for words, families in FAMILIES.items():
        for ratio in (0.2, 0.5):
            settings = ShrinkSettings(ratio=ratio, ratio_of="block_parameters", families=families, round_to=64)
            plan = planned(model, find_units(model, families), {}, settings)
            small, macs = shrunk(model, plan), Surgery(model, plan).summary["macs_per_token"]
            case = f"SmolLM2-135M float32, {words}, {ratio:.0%}"
            figures = {"dense": latency(dense), "cut": latency(small)}
            for metric, unit in UNITS.items():
                peer = {"peer": "dense", "peer_value": figures["dense"][metric]["median"]}
                for subject, found in figures.items():
                    spread = {"low": found[metric]["low"], "high": found[metric]["high"]}
                    more = peer if subject == "cut" else {}
                    value = found[metric]["median"]
                    table.append(rows.row(case, metric, unit, subject, value, samples=5, **spread, **more))
            for metric, before, after in (
                ("multiply-adds per token", macs["before"], macs["after"]),
                ("bytes in memory", memory_bytes(dense), memory_bytes(small)),
            ):
                table.append(rows.row(case, metric, "1", "cut", after, samples=1, peer="dense", peer_value=before))
            rows.write("structured_speed", table)
            print(case, figures, macs, flush=True)
            if ratio == 0.5:
                for network in (dense, small):
                    print(profile(network))


@torch.no_grad()
def profile(network: torch.nn.Module) -> str:
    """Where a prefill spends its time."""
    tokens = torch.arange(256)[None]
    network(tokens, use_cache=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(3):
            network(tokens, use_cache=False)
    return str(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40))


if __name__ == "__main__":
    main()
