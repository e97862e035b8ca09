"""Claim: of denoisers a GPU's own account agrees with the predicted memory, and slices of 96 MiB cost it at most a tenth of the time of a step.

    python benchmarks/video_speed.py                 # needs a GPU of 40 GiB
    python benchmarks/video_speed.py --shrink 4      # a quarter of the height and width: on a processor

Runs one denoising step, and the decoding of a video, with random weights and real data at true shapes, in half precision on a GPU and in single on a processor: as it is, with the options of diffusers, each and together, and in slices.
Measures seconds (median; guidance branch by branch counts both), and the most memory beyond weights: the allocator's on a GPU, the ledger's on a processor. Adds to
benchmarks/results/video_speed.csv after every run; runs that stand there are left out. Two minutes of a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import rows
from duramen.hardware.clock import repeated
from duramen.hardware.machine import fastest_device
from duramen.video.ledger import peak_of
from duramen.video.plan import Clip, example
from duramen.video.slices import Slices
from duramen.video.streamline import Streamlined
from video_memory import IMAGES, NETWORKS, SLICED

PEER = "as it is"
SUBJECTS: dict[str, tuple[Slices | None, tuple[str, ...]]] = {
    PEER: (None, ()),
    "guidance branch by branch": (None, ("branch",)),
    "forward chunking": (None, ("chunking",)),
    "both": (None, ("branch", "chunking")),
    IMAGES: (None, ("slicing",)),
    **{label: (slices, ()) for label, slices in SLICED.items() if slices.donate},
    "streamlined, 96 MiB, branch by branch": (SLICED["streamlined, 96 MiB"], ("branch",)),
}
OPTIONS: dict[str, Callable[[Any], None]] = {
    "chunking": lambda network: network.enable_forward_chunking(1, 0),
    "slicing": lambda network: network.enable_slicing(),
}


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS))
    parser.add_argument("--shrink", type=int, default=1, help="by which height and width are divided")
    parser.add_argument("--passes", type=int, default=3)
    options = parser.parse_args()
    device = fastest_device()
    for name in options.networks:
        meta, full, *_ = NETWORKS[name]()
        clip = replace(full, height=full.height // options.shrink, width=full.width // options.shrink)
        case = f"{'half' if device.type == 'cuda' else 'single'} precision, {clip.width}x{clip.height}, {name}"
        network = materialized(meta, device)
        for subject in options.subjects:
            if possible(network, clip, subject) and not stands(case, subject):
                try:
                    measure(case, subject, network, clip, options.passes)
                except torch.cuda.OutOfMemoryError as error:
                    print(case, subject, error, flush=True)
        del network
        torch.cuda.empty_cache()


def materialized(network: Any, device: torch.device) -> Any:
    """A network with small random weights."""
    network = network.to_empty(device=device).eval().requires_grad_(False)
    network = network if device.type == "cuda" else network.float()
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(0, 0.02, generator=generator)
    return network


def possible(network: Any, clip: Clip, subject: str) -> bool:
    """Whether a network has what a subject asks of it."""
    slices, asked = SUBJECTS[subject]
    transformer = "Transformer" in type(network).__name__
    if transformer:
        return not asked
    known = {"branch": clip.guided and not hasattr(network, "decode"), "chunking": hasattr(network, "enable_forward_chunking")}
    known["slicing"] = type(network).__name__ == "AutoencoderKL"
    return all(known[each] for each in asked) and (slices is None or not known["slicing"])


def stands(case: str, subject: str) -> bool:
    """Whether a subject was measured."""
    return any((row["case"], row["subject"]) == (case, subject) for row in rows.read("video_speed"))


@torch.no_grad()
def measure(case: str, subject: str, network: Any, clip: Clip, passes: int) -> None:
    """One subject; options of diffusers stay with the copy of the network that they change, so it is put back."""
    slices, asked = SUBJECTS[subject]
    for each in asked:
        if each in OPTIONS:
            OPTIONS[each](network)
    calls = 2 if "branch" in asked else 1
    run = example(network, replace(clip, guided=clip.guided and calls == 1))
    handle = None if slices is None else Streamlined([network], slices)
    try:
        peak, seconds = memory_of(run, network), float(np.median(repeated(run, passes))) * calls
    finally:
        if handle is not None:
            handle.remove()
        if "chunking" in asked:  # not every network has a way back
            for module in network.modules():
                if "_chunk_size" in module.__dict__:
                    module._chunk_size = None
        if "slicing" in asked:
            network.disable_slicing()
    table = rows.read("video_speed")
    print(case, subject, round(peak, 3), "GiB", round(seconds, 3), "s", flush=True)
    for metric, unit, value in (("peak beyond weights", "GiB", peak), ("time", "s", seconds)):
        peer = rows.peer_of(table, case, metric, PEER)
        samples = passes if metric == "time" else 1
        table.append(rows.row(case, metric, unit, subject, value, samples=samples, **rows.beside(peer)))
    rows.write("video_speed", table)


def memory_of(run: Callable[[], Any], network: Any) -> float:
    """GiB beyond what is there before."""
    if next(network.parameters()).device.type != "cuda":
        return peak_of(run) / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


if __name__ == "__main__":
    main()
