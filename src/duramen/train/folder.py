"""Folders of language models in training: made, opened, sharded over processes, and put together again to be saved."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from duramen.calibrate import ranks
from duramen.families.model import BlockModel
from duramen.problem import Exit, Problem

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)


def make_causal(model: dict[str, Any], vocabulary: int, seed: int) -> Any:
    """A new language model.

    Args:
        model: ``model_type`` and keys of its transformers configuration.
        vocabulary: Tokens of its tokenizer.
        seed: Of its weights.

    Raises:
        Problem: If the type or a key is unknown, or the vocabulary too small.
    """
    from transformers import AutoModelForCausalLM

    config = configuration(model, vocabulary)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def configuration(model: dict[str, Any], vocabulary: int) -> Any:
    """The configuration of a new model, with the tokenizer's vocabulary unless it names a larger one."""
    from transformers import AutoConfig

    keys = {"vocab_size": vocabulary} | model
    kind = str(keys.pop("model_type", ""))
    try:
        config = AutoConfig.for_model(kind, **keys)
    except (ValueError, TypeError, KeyError) as error:
        raise Problem(
            f"`model` is no configuration: {str(error).splitlines()[0]}.", why="it takes transformers' own names.",
            fix="`model: {model_type: llama, hidden_size: 256, num_hidden_layers: 8, …}`",
        ) from error  # fmt: skip
    known = AutoConfig.for_model(kind).to_dict()
    unknown = [key for key in keys if key not in known and not hasattr(type(config), key)]
    if unknown:
        raise Problem(
            f"A {kind} has no {', '.join(f'`{key}`' for key in unknown)}.", why="its configuration does not know the key.",
            fix=f"one of {', '.join(sorted(known))}.",
        )  # fmt: skip
    check_vocabulary(config, vocabulary)
    return config


def check_vocabulary(config: Any, vocabulary: int) -> None:
    """Stops where a tokenizer has tokens that a model does not have.

    Raises:
        Problem: Then.
    """
    if config.vocab_size < vocabulary:
        raise Problem(
            f"The tokenizer has {vocabulary:,} tokens, and the model an embedding of {config.vocab_size:,}.",
            why="they belong to different models, or `vocab_size` is too small.",
            fix="the tokenizer of the model, or a new model.",
            code=Exit.INCOMPATIBLE,
        )


def open_causal(folder: Path) -> Any:
    """A language model in memory, in float32, on the processor."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_causal(network: Any, folder: Path, tokenizer: Path, state: dict[str, Tensor] | None = None) -> None:
    """Writes a plain folder with the tokenizer's files beside the weights; it is there only once it is whole.

    Args:
        network: Has the configuration, and the weights unless ``state`` does.
        folder: To write.
        tokenizer: A folder with its files.
        state: The weights, if they are not those of the network.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.save_pretrained(partial, state_dict=state)
    for name in TEXT_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, partial / name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def share_out(network: nn.Module, dtype: torch.dtype) -> None:
    """Shards a model over the processes (FSDP2), block by block; one process keeps it whole.

    Args:
        network: On the device of the process.
        dtype: Of what is computed; weights, gradients and the optimizer stay in float32.
    """
    if ranks.count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(network.parameters()).device
    mesh = init_device_mesh(device.type, (ranks.count(),))
    policy = (
        MixedPrecisionPolicy()
        if dtype == torch.float32
        else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    )
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def blocks_of(network: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a model."""
    return list(BlockModel.of(network).blocks)


def gathered(network: nn.Module) -> dict[str, Tensor]:
    """All weights of a model, whole, on the processor of every process."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in network.state_dict().items()
    }
