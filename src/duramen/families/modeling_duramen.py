"""Models whose layers differ in heads and widths, or lack attention or the MLP. Needs transformers 5.15 or later, and nothing else.

Duramen writes this file beside the weights of such a model, for ``trust_remote_code``. Every layer is a stock layer built from its own
entry of ``per_layer_config``; the class names, such as ``DuramenLlamaForCausalLM``, are made from the stock ones when they are asked for.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn


@dataclass(frozen=True)
class Stock:
    """Where transformers has a family, what its layers call their parts, and whether the parts add the residual themselves."""

    prefix: str
    package: str
    layer: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: tuple[str, ...] = ("mlp",)
    config: str = ""
    adds: bool = False


STOCK = {
    "llama": Stock("Llama", "llama", "LlamaDecoderLayer"),
    "mistral": Stock("Mistral", "mistral", "MistralDecoderLayer"),
    "qwen2": Stock("Qwen2", "qwen2", "Qwen2DecoderLayer"),
    "qwen3": Stock("Qwen3", "qwen3", "Qwen3DecoderLayer"),
    "smollm3": Stock("SmolLM3", "smollm3", "SmolLM3DecoderLayer"),
    "gemma": Stock("Gemma", "gemma", "GemmaDecoderLayer"),
    "gemma2": Stock("Gemma2", "gemma2", "Gemma2DecoderLayer"),
    "gemma3_text": Stock("Gemma3", "gemma3", "Gemma3DecoderLayer", config="Gemma3TextConfig"),
    "phi3": Stock("Phi3", "phi3", "Phi3DecoderLayer"),
    "opt": Stock("OPT", "opt", "OPTDecoderLayer", "model.decoder.layers", mlp=("fc1", "fc2")),
    "bloom": Stock("Bloom", "bloom", "BloomBlock", "transformer.h", "self_attention", adds=True),
    "gpt_neox": Stock("GPTNeoX", "gpt_neox", "GPTNeoXLayer", "gpt_neox.layers", "attention"),
    "gpt2": Stock("GPT2", "gpt2", "GPT2Block", "transformer.h", "attn"),
}


class Skipped(nn.Module):
    """Stands where attention or the MLP was removed: adds nothing to the residual stream."""

    def __init__(self, *, pair: bool, adds: bool) -> None:
        super().__init__()
        self.pair, self.adds = pair, adds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros; or the residual, where adding it is left to the part."""
        output = args[1] if self.adds else torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (output, None) if self.pair else output


def build_layer(model_type: str, stock_layer: type[nn.Module], config: Any, own: Any, index: int) -> nn.Module:
    """One layer of its own shape."""
    stock = STOCK[model_type]
    if model_type in NARROW:
        layer = stock_layer(config, index)
        NARROW[model_type](layer, own, config.hidden_size // config.num_attention_heads)
    else:
        layer = stock_layer(own, index)
    for part in getattr(own, "skip", None) or ():
        for name in (stock.attention,) if part == "attention" else stock.mlp:
            setattr(layer, name, Skipped(pair=part == "attention", adds=stock.adds))
    return layer


def _linear(module: nn.Module, name: str, outputs: int, inputs: int) -> None:
    bias = getattr(module, name).bias is not None
    setattr(module, name, nn.Linear(inputs, outputs, bias=bias))


def _narrow_opt(layer: Any, own: Any, head: int) -> None:
    attention, width = layer.self_attn, own.hidden_size
    attention.num_heads = own.num_attention_heads
    for name in ("q_proj", "k_proj", "v_proj"):
        _linear(attention, name, attention.num_heads * head, width)
    _linear(attention, "out_proj", width, attention.num_heads * head)
    _linear(layer, "fc1", own.ffn_dim, width)
    _linear(layer, "fc2", width, own.ffn_dim)


def _narrow_fused(attention: Any, mlp: Any, inner: int, ffn: int, width: int) -> None:
    """Parts named as in Megatron: q, k and v in one matrix."""
    _linear(attention, "query_key_value", 3 * inner, width)
    _linear(attention, "dense", width, inner)
    _linear(mlp, "dense_h_to_4h", ffn, width)
    _linear(mlp, "dense_4h_to_h", width, ffn)


def _narrow_gpt_neox(layer: Any, own: Any, head: int) -> None:
    _narrow_fused(layer.attention, layer.mlp, own.num_attention_heads * head, own.intermediate_size, own.hidden_size)


def _narrow_bloom(layer: Any, own: Any, head: int) -> None:
    attention, width = layer.self_attention, own.hidden_size
    kept = getattr(own, "alibi_heads", None) or list(range(own.n_head))
    ffn = getattr(own, "intermediate_size", None) or 4 * width
    layer.num_heads = attention.num_heads = len(kept)
    _narrow_fused(attention, layer.mlp, len(kept) * head, ffn, width)
    whole = width // head

    def keep_slopes(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Every head that is left keeps the slope that it was trained with."""
        alibi = kwargs["alibi"].unflatten(0, (-1, whole))
        return args, kwargs | {"alibi": alibi[:, kept].flatten(0, 1)}

    attention.register_forward_pre_hook(keep_slopes, with_kwargs=True)


def _narrow_gpt2(layer: Any, own: Any, head: int) -> None:
    from transformers.pytorch_utils import Conv1D

    attention, width, inner = layer.attn, own.hidden_size, own.n_inner or 4 * own.hidden_size
    attention.num_heads, attention.split_size = own.n_head, own.n_head * head
    attention.c_attn = Conv1D(3 * own.n_head * head, width)
    attention.c_proj = Conv1D(width, own.n_head * head)
    layer.mlp.c_fc, layer.mlp.c_proj = Conv1D(inner, width), Conv1D(width, inner)


NARROW = {"opt": _narrow_opt, "gpt_neox": _narrow_gpt_neox, "bloom": _narrow_bloom, "gpt2": _narrow_gpt2}
"""Families whose stock layers take head counts or widths from the model's width."""


@cache
def classes(model_type: str) -> tuple[Any, Any]:
    """The config and the model class of a family whose layers may differ."""
    stock = STOCK[model_type]
    package = f"transformers.models.{stock.package}"
    configuration = importlib.import_module(f"{package}.configuration_{stock.package}")
    modeling = importlib.import_module(f"{package}.modeling_{stock.package}")
    prefix = stock.prefix
    parent = getattr(modeling, "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM")
    stock_layer = getattr(modeling, stock.layer)
    config_body = {
        "model_type": f"duramen_{model_type}",
        "validate_architecture": lambda self: None,
        "allow_global_per_layer_attribute_access": True,
        "__module__": __name__,
    }
    stock_config = getattr(configuration, stock.config or f"{prefix}Config")
    own_config: Any = strict(type(f"Duramen{prefix}Config", (stock_config,), config_body))

    def build(self: Any, config: Any) -> None:
        parent.__init__(self, config)
        layers = self.get_submodule(stock.layers)
        for index, own in enumerate(config.per_layer_config):
            layers[index] = build_layer(model_type, stock_layer, config, own, index)
        self.post_init()

    model_body = {"config_class": own_config, "__init__": build, "__module__": __name__}
    own_model: Any = type(f"Duramen{prefix}ForCausalLM", (parent,), model_body)
    if not __name__.startswith("duramen."):  # loaded from beside the weights: a saved copy carries this file on
        own_config.register_for_auto_class()
        own_model.register_for_auto_class("AutoModelForCausalLM")
    return own_config, own_model


def __getattr__(name: str) -> Any:
    for model_type, stock in STOCK.items():
        if name in (f"Duramen{stock.prefix}Config", f"Duramen{stock.prefix}ForCausalLM"):
            own_config, own_model = classes(model_type)
            return own_config if name.endswith("Config") else own_model
    raise AttributeError(name)
