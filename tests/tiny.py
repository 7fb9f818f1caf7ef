"""Tiny language models that a plan and a real training step are compared on."""

from __future__ import annotations

import torch
import transformers
from torch import nn

import fastlora

TINY = dict(
    vocab_size=160, hidden_size=64, intermediate_size=112, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", TINY),
    "mixtral": ("MixtralConfig", TINY | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3": ("Qwen3Config", TINY | dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-moe": ("Qwen3MoeConfig", TINY | dict(head_dim=16, num_experts=8, num_experts_per_tok=2,
                                                moe_intermediate_size=48)),
}  # fmt: skip


def make_config(name: str, dtype: torch.dtype = torch.float32):
    kind, settings = MODELS[name]
    return getattr(transformers, kind)(dtype=dtype, **settings)


def make_patched(config, **settings) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.config.use_cache = False
    return fastlora.patch(model, **settings).train()
