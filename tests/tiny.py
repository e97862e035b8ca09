"""Tiny random models of every family, made in milliseconds, with a byte tokenizer and some prose."""

import random

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCAB = 259
_SHARED = {"vocab_size": VOCAB, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}
_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, **_SHARED,
}  # fmt: skip
_HEADS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512, **_SHARED}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "mistral": lambda: MistralConfig(**_LLAMA),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen3": lambda: Qwen3Config(**_LLAMA),
    "smollm3": lambda: SmolLM3Config(**_LLAMA),
    "gemma": lambda: GemmaConfig(**_LLAMA),
    "gemma2": lambda: Gemma2Config(**_LLAMA, sliding_window=16, query_pre_attn_scalar=8),
    "gemma3_text": lambda: Gemma3TextConfig(**_LLAMA, sliding_window=16, query_pre_attn_scalar=8),
    "opt": lambda: OPTConfig(**_HEADS, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=512, **_SHARED),
    "gpt_neox": lambda: GPTNeoXConfig(**_HEADS, intermediate_size=48),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=3, n_head=4, **_SHARED),
    "phi3": lambda: Phi3Config(**_LLAMA),
}


def model(name, seed=0):
    """A random float32 model whose layers all matter: weights of scale 0.2, norms near one."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for path, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif path.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def tokenizer():
    """One token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"<pad>": 256, "<s>": 257, "</s>": 258}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save(name, folder, seed=0):
    """Writes a model with its tokenizer as a Hugging Face folder."""
    model(name, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prose(seed, words):
    """Random words of a small vocabulary, in sentences."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(200)]
    return ". ".join(" ".join(draw.choices(vocabulary, k=9)) for _ in range(words // 9))


def ids(batch=2, length=40):
    """Random token ids."""
    return torch.randint(0, 250, (batch, length))


def correlated(inputs, tokens, seed=0, scale=1.0):
    """Activations [I, tokens] whose Gram has a power-law spectrum and badly scaled channels, float64."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64))
    spectrum = torch.arange(1, inputs + 1, dtype=torch.float64) ** -0.75
    columns = torch.exp(scale * torch.randn(inputs, generator=generator, dtype=torch.float64))
    noise = torch.randn(inputs, tokens, generator=generator, dtype=torch.float64)
    return columns[:, None] * (basis @ (spectrum[:, None] * noise))
