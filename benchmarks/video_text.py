"""Claim: in eight bits a video pipeline's text encoder takes about half of its bytes, and says nearly the same.

    python benchmarks/video_text.py

Counts the bytes of the text encoders of AnimateDiff (CLIP-L), LTX-Video (T5-XXL) and Wan (UMT5-XXL) at their true shapes in half precision, without data, as they are and with linear layers in eight
bits; of the first, with random weights, also how far a prompt's embeddings move and the seconds that it takes. Writes benchmarks/results/video_text.csv. Three minutes on 2 cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

import rows
from duramen.video.text import bytes_held, hold_in_codes

XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "CLIP-L, AnimateDiff": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
    "T5-XXL, LTX-Video": lambda: T5EncoderModel(T5Config(vocab_size=32128, **XXL)),
    "UMT5-XXL, Wan": lambda: UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL)),
}
REPEATS = 9


@torch.no_grad()
def main() -> None:
    """Counts, and times one."""
    table = []
    for name, make in ENCODERS.items():
        with torch.device("meta"):
            encoder = make().half()
        before = bytes_held(encoder)
        hold_in_codes(encoder)
        table.append(rows.row(name, "bytes of the text encoder", "B", "as it is", before, samples=1))
        beside = {"peer": "as it is", "peer_value": before}
        table.append(rows.row(name, "bytes of the text encoder", "B", "eight bits", bytes_held(encoder), samples=1, **beside))
    rows.write("video_text", table + timed("CLIP-L, AnimateDiff"))


def timed(name: str) -> list[dict[str, object]]:
    """Of an encoder with random weights in float32, with a prompt of all its places."""
    torch.manual_seed(0)
    encoder = ENCODERS[name]().eval()
    ids = torch.randint(0, 49405, (1, 77))
    dense, spent = encoder(ids)[0], {"as it is": seconds(encoder, ids)}
    hold_in_codes(encoder)
    spent["eight bits"] = seconds(encoder, ids)
    moved = float((encoder(ids)[0] - dense).norm() / dense.norm())
    table = [rows.row(name, "embeddings moved", "1", "eight bits", moved, samples=1)]
    for subject, found in spent.items():
        beside = {"peer": "as it is", "peer_value": float(np.median(spent["as it is"]))} if subject != "as it is" else {}
        table.append(
            rows.row(
                name,
                "seconds of a prompt",
                "s",
                subject,
                float(np.median(found)),
                low=min(found),
                high=max(found),
                samples=REPEATS,
                **beside,
            )
        )
    return table


def seconds(encoder: nn.Module, ids: torch.Tensor) -> list[float]:
    """Of every repeat, after one that does not count."""
    found = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        encoder(ids)
        found.append(time.perf_counter() - begun)
    return found[1:]


if __name__ == "__main__":
    main()
