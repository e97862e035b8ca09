"""Worker for structured_quality.py, in an environment of its own: cuts FFN channels by torch-pruning and writes what is left.

    PEER/bin/python benchmarks/peer_torch_pruning.py MODEL TOKENS WIDTH IMPORTANCE OUT

Every MLP keeps WIDTH channels. IMPORTANCE is ``magnitude`` or ``taylor``; the latter sees the gradient of the mean loss over the same sequences that Duramen's
scores see.
"""

from __future__ import annotations

import sys

import torch_pruning
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from worker import Work

CLASSES = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
}


def main(folder: str, tokens_file: str, width: str, importance: str, out: str) -> None:
    """Prunes and writes the state dict."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    sequences = load_file(tokens_file)["tokens"]
    mlps = [layer.mlp for layer in model.model.layers]
    share = 1 - (int(width) + 0.5) / mlps[0].gate_proj.out_features  # it rounds what stays down
    with Work() as work:
        pruner = torch_pruning.pruner.BasePruner(
            model, {"input_ids": sequences[:1], "use_cache": False}, importance=CLASSES[importance](),
            pruning_ratio=0.0, pruning_ratio_dict={layer: share for mlp in mlps for layer in (mlp.gate_proj, mlp.up_proj)},
            ignored_layers=[model.lm_head], output_transform=lambda output: output.logits.sum(),
        )  # fmt: skip
        if importance == "taylor":
            for sequence in sequences:
                (model(sequence[None], labels=sequence[None]).loss / len(sequences)).backward()
        pruner.step()
    assert {mlp.down_proj.in_features for mlp in mlps} == {int(width)}, [mlp.down_proj.in_features for mlp in mlps]
    left = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    work.hand_over(left, out, "torch-pruning")


if __name__ == "__main__":
    main(*sys.argv[1:])
