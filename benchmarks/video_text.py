"""Claim: in eight bits a video pipeline's text encoder takes about half of its bytes, and says nearly the same.

    python benchmarks/video_text.py

Counts the bytes of the text encoders of AnimateDiff (CLIP-L), LTX-Video (T5-XXL) and Wan (UMT5-XXL) at their true shapes in half precision, without data, as they are and with linear layers in eight
bits; of the first, with random weights, also how far a prompt's embeddings move and the seconds that it takes. Writes benchmarks/results/video_text.csv. Three minutes on 2 cores.
"""

from __future__ import annotations

import copy
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
REPEATS = 15


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
    """Of an encoder with random weights in float32, as it is and in eight bits by turns, with a prompt of all its places."""
    torch.manual_seed(0)
    dense = ENCODERS[name]().eval()
    coded, ids = copy.deepcopy(dense), torch.randint(0, 49405, (1, 77))
    hold_in_codes(coded)
    said, spent = {}, {"as it is": [], "eight bits": []}
    for _ in range(REPEATS + 1):
        for subject, encoder in zip(spent, (dense, coded), strict=True):
            begun = time.perf_counter()
            said[subject] = encoder(ids)[0]
            spent[subject].append(time.perf_counter() - begun)
    moved = float((said["eight bits"] - said["as it is"]).norm() / said["as it is"].norm())
    table = [rows.row(name, "embeddings moved", "1", "eight bits", moved, samples=1)]
    for subject, (_, *found) in spent.items():
        beside = {} if subject == "as it is" else {"peer": "as it is", "peer_value": float(np.median(spent["as it is"][1:]))}
        more = {"low": min(found), "high": max(found), "samples": REPEATS} | beside
        table.append(rows.row(name, "seconds of a prompt", "s", subject, float(np.median(found)), **more))
    return table


if __name__ == "__main__":
    main()
