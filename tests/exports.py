"""Bases and adapters on disk, and what the libraries themselves write of a merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from models import VOCABULARY, make_batch, make_model
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora

LINEARS = ["q_proj", "v_proj", "down_proj"]
SMALL = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)


def make_pair(model: nn.Module, folder: Path, **settings: Any) -> tuple[Path, Path]:
    """A base of several files and an adapter with random values in all of its tensors."""
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base, max_shard_size="40KB")
    (base / "tokenizer_config.json").write_text("{}")
    (base / "optimizer.bin").write_bytes(b"pickle")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS} | settings
    adapted = peft.get_peft_model(type(model).from_pretrained(base, dtype="auto"), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data += drawn.to(parameter.dtype)
    adapted.save_pretrained(adapter)
    return base, adapter


def llama_pair(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Path, Path]:
    return make_pair(make_model("llama", dtype), folder, **settings)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**make_batch()).logits


def merged_model(base: Path, adapter: Path, dtype: torch.dtype | None = None) -> Any:
    """The model merged in memory, from the base in a dtype."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto")
    return fastlora.unload(fastlora.load(model, adapter), merge=True).eval()


def compressed_by_the_library(model: Any, folder: Path, activations: bool) -> Path:
    """The model as compressed-tensors writes it, with scales `max |w| / 127` per output feature."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    per_channel = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True, dynamic=False)
    per_token = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=per_channel, input_activations=per_token if activations else None
    )
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.abs().amax(dim=1, keepdim=True) / 127)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def quantized_by_bitsandbytes(model: Any, folder: Path) -> Path:
    """The model as transformers writes it when bitsandbytes has quantised it."""
    model.save_pretrained(folder / "dense")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    loaded.save_pretrained(folder / "quantized")
    return folder / "quantized"


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, dtypes, shapes and values are the same."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name
