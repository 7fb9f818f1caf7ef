"""Tiny random models, made from configs."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 96
_SMALL = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)

# How to make each model, and linear targets that cover its attention and its feed-forward.
MODELS = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **_SMALL)),
        ["q_proj", "v_proj", "down_proj"],
    ),
    "qwen2": (
        lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_key_value_heads=2, **_SMALL)),
        ["q_proj", "k_proj", "up_proj"],
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64,
                                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        ),
        ["c_attn", "c_fc"],
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, vocab_size=VOCABULARY,
                                  dropout_rate=0.0, decoder_start_token_id=0)
        ),
        ["q", "v", "wi"],
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_SMALL)
        ),
        ["query", "value", "dense"],
    ),
}  # fmt: skip


def make_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name][0]().to(dtype)


def make_batch(tokens: int = 12, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Inputs and labels that every model of `MODELS` takes."""
    ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}
