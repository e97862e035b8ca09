"""Tiny random models of every family, made in milliseconds, with a byte tokenizer and some prose."""

import random

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    NemotronHConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Zamba2Config,
)

from duramen.calibrate.tokens import byte_tokenizer as tokenizer

VOCAB = 259
_SHARED = {"vocab_size": VOCAB, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}
_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, **_SHARED,
}  # fmt: skip
_HEADS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512, **_SHARED}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, **_SHARED}
MAMBA = ("mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "zamba2", "nemotron_h")
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
    "mamba": lambda: MambaConfig(**_MAMBA, time_step_rank=4),
    "falcon_mamba": lambda: FalconMambaConfig(**_MAMBA, time_step_rank=4),
    "mamba2": lambda: Mamba2Config(**_MAMBA, num_heads=4, head_dim=16, n_groups=1, chunk_size=16, expand=2),
    "jamba": lambda: JambaConfig(
        **_LLAMA,
        num_experts=2,
        num_experts_per_tok=1,
        expert_layer_period=3,
        expert_layer_offset=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "bamba": lambda: BambaConfig(
        **_LLAMA, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16
    ),
    "zamba2": lambda: Zamba2Config(
        **(_HEADS | {"num_hidden_layers": 4}),
        intermediate_size=48,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=4,
        mamba_d_state=8,
        chunk_size=16,
        adapter_rank=4,
        use_mamba_kernels=False,
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **{key: value for key, value in _LLAMA.items() if key != "num_hidden_layers"},
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=16,
        use_mamba_kernels=False,
        n_routed_experts=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        num_experts_per_tok=1,
        layers_block_type=["mamba", "attention", "mlp", "moe"],
    ),
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


def save(name, folder, seed=0):
    """Writes a model with its tokenizer as a Hugging Face folder."""
    model(name, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_wide(folder, *, width, blocks, tied=False):
    """Writes a llama whose widths fit blocks of 32 numbers, as packed formats want them."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=VOCAB, max_position_embeddings=512, tie_word_embeddings=tied,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
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
