"""Rounds one model's weights by NNCF, in an environment of its own.

    python peer_nncf.py MODEL_FOLDER TOKENS.safetensors {"W4 row","W4 g64","W8 row"} OUT.safetensors

At four bits with what it offers for torch, activation-aware scaling (AWQ) and the estimation of scales; at eight it needs no tokens. Writes all weights of the
blocks, the norms' too, since scales may move into them.
"""

from __future__ import annotations

import sys

import nncf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from worker import Work, block_weights

MODES = {"W8": nncf.CompressWeightsMode.INT8_SYM, "W4": nncf.CompressWeightsMode.INT4_SYM}
HOOK = "__nncf_hooks.post_hooks.{}__0.0"


def decompressed(network: nn.Module, name: str) -> Tensor:
    """A weight as the forward pass sees it."""
    return network.get_submodule(HOOK.format(name.replace(".", ":")))(network.get_parameter(name)).detach().float()


def main(folder: str, tokens_file: str, target: str, out: str) -> None:
    """Runs it."""
    bits, share = target.split()
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    names = list(block_weights(network))
    rows = [{"input_ids": row[None], "use_cache": False} for row in load_file(tokens_file)["tokens"]]
    more = {"ignored_scope": nncf.IgnoredScope(patterns=[".*embed.*", ".*lm_head.*"]), "dataset": nncf.Dataset(rows)}
    if bits == "W4":
        group = -1 if share == "row" else int(share.removeprefix("g"))
        more |= {"ratio": 1.0, "group_size": group, "awq": True, "scale_estimation": True, "subset_size": len(rows)}
    with Work() as work:
        network = nncf.compress_weights(network, mode=MODES[bits], **more)
    left = [name for name in network.state_dict() if "pre_hooks" in name]
    assert not left, f"scales that move into no weight: {left}"
    norms = {name: each.detach() for name, each in network.named_parameters() if name.endswith("norm.weight")}
    work.hand_over(norms | {name: decompressed(network, name) for name in names}, out, "nncf")


if __name__ == "__main__":
    main(*sys.argv[1:])
