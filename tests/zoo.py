"""Tiny random models of many architectures, made from configs, with inputs and targets for each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, TOKENS, BATCH = 64, 6, 2


class Architecture(NamedTuple):
    """A model class, the settings of its config, LoRA targets, how to make inputs, and a module to train whole."""

    model: str
    config: str
    settings: dict[str, Any]
    targets: list[str]
    inputs: Callable[[], dict[str, Tensor]]
    saved: str


def text() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(2, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))}


def text_pair() -> dict[str, Tensor]:
    ids = text()["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def image_and_text() -> dict[str, Tensor]:
    return image() | text()


def audio() -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 400, generator=torch.Generator().manual_seed(1))}


def spectrogram() -> dict[str, Tensor]:
    ids = text()["input_ids"]
    return {
        "input_features": torch.randn(BATCH, 8, 20, generator=torch.Generator().manual_seed(1)),
        "decoder_input_ids": ids,
    }


COMMON = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=1)
DECODER = COMMON | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
ENCODER = COMMON | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
T5 = COMMON | dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
QKV = ["q_proj", "v_proj"]

ZOO: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", DECODER, [*QKV, "down_proj"], text, "lm_head"),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", DECODER, QKV, text, "lm_head"),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", DECODER, ["q_proj", "k_proj", "up_proj"], text, "lm_head"),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", DECODER | dict(head_dim=8), QKV, text, "lm_head"),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", DECODER | dict(head_dim=8), QKV, text, "norm"),
    "phi": Architecture("PhiForCausalLM", "PhiConfig", DECODER, ["q_proj", "fc1"], text, "lm_head"),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", DECODER, ["qkv_proj", "gate_up_proj"], text, "lm_head"),
    "olmo2": Architecture("Olmo2ForCausalLM", "Olmo2Config", DECODER, QKV, text, "lm_head"),
    "starcoder2": Architecture("Starcoder2ForCausalLM", "Starcoder2Config", DECODER | dict(
        residual_dropout=0.0, embedding_dropout=0.0), ["q_proj", "c_fc"], text, "lm_head"),
    "glm": Architecture("GlmForCausalLM", "GlmConfig", DECODER | dict(head_dim=8), ["q_proj", "gate_up_proj"], text,
                        "lm_head"),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", COMMON | dict(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ), ["c_attn", "c_fc"], text, "ln_f"),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER, ["query_key_value"], text,
                             "final_layer_norm"),
    "bloom": Architecture("BloomForCausalLM", "BloomConfig", COMMON | dict(
        hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    ), ["query_key_value", "dense_h_to_4h"], text, "ln_f"),
    "falcon": Architecture("FalconForCausalLM", "FalconConfig", COMMON | dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0
    ), ["query_key_value", "dense"], text, "ln_f"),
    "opt": Architecture("OPTForCausalLM", "OPTConfig", COMMON | dict(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
        word_embed_proj_dim=32, dropout=0.0
    ), ["q_proj", "fc1"], text, "final_layer_norm"),
    "bert": Architecture("BertForMaskedLM", "BertConfig", ENCODER, ["query", "value"], text, "predictions.transform"),
    "roberta": Architecture("RobertaForSequenceClassification", "RobertaConfig", ENCODER | dict(
        max_position_embeddings=40), ["query", "value"], text, "classifier"),
    "distilbert": Architecture("DistilBertForSequenceClassification", "DistilBertConfig", COMMON | dict(
        dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=32, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0
    ), ["q_lin", "v_lin"], text, "classifier"),
    "deberta-v2": Architecture("DebertaV2ForTokenClassification", "DebertaV2Config", ENCODER, ["query_proj", "dense"],
                               text, "classifier"),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5, ["q", "v", "wi"], text_pair, "final_layer_norm"),
    "mt5": Architecture("MT5ForConditionalGeneration", "MT5Config", T5, ["q", "v", "wi_0"], text_pair,
                        "final_layer_norm"),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", COMMON | dict(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, dropout=0.0, decoder_start_token_id=0,
        forced_eos_token_id=None
    ), ["q_proj", "fc2"], text_pair, "layernorm_embedding"),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", VISION, QKV, image, "classifier"),
    "dinov2": Architecture("Dinov2ForImageClassification", "Dinov2Config", VISION, ["query", "fc1"], image,
                           "classifier"),
    "whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", COMMON | dict(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
        decoder_start_token_id=1, dropout=0.0, suppress_tokens=None, begin_suppress_tokens=None
    ), QKV, spectrogram, "decoder.layer_norm"),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", "Wav2Vec2Config", COMMON | dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, conv_dim=[8, 8],
        conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0,
        feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, apply_spec_augment=False
    ), QKV, audio, "lm_head"),
    "mixtral": Architecture("MixtralForCausalLM", "MixtralConfig", DECODER | dict(
        num_local_experts=2, num_experts_per_tok=2), QKV, text, "lm_head"),
    "qwen3-moe": Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig", DECODER | dict(
        head_dim=8, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=24), QKV, text, "lm_head"),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A model in float64, the same at every call."""
    return copy.deepcopy(_built(name))


@functools.cache
def _built(name: str) -> nn.Module:
    architecture = ZOO[name]
    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**architecture.settings)
    config._experts_implementation = "eager"  # the grouped product takes no float64
    model = getattr(transformers, architecture.model)(config).double().eval()
    for module in model.modules():
        # At the kink of ReLU a last bit decides over a whole gradient.
        if isinstance(module, nn.ReLU):
            module.forward = nn.functional.gelu
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """Inputs in the dtype of the models."""
    return {k: v.double() if v.is_floating_point() else v for k, v in ZOO[name].inputs().items()}
