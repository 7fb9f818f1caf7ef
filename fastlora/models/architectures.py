"""Default targets by transformers `model_type`: the attention projections that LoRA's authors and PEFT adapt."""

from __future__ import annotations

_SPLIT = ["q_proj", "v_proj"]
_FUSED = ["query_key_value"]
_BERT = ["query", "value"]
_T5 = ["q", "v"]
_GPT2 = ["c_attn"]

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"), _SPLIT),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _SPLIT),
    **dict.fromkeys(("bloom", "chatglm", "falcon", "gpt_neox", "RefinedWeb", "RefinedWebModel"), _FUSED),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _BERT),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "blip-2": [*_T5, *_SPLIT],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ["Wqkv"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi": [*_SPLIT, "fc1", "fc2"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}
