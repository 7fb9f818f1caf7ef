"""Checkpoints and adapters on disk, made from tiny models, and what merging in memory makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
import transformers
from models import make_model
from safetensors.torch import load_file, save_file

import fastlora

ADAPTER_FILE = "adapter_model.safetensors"


def randomise(model, seed: int = 5) -> None:
    """Values for everything that an adapter trains, which zeros would hide."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            change = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.copy_(parameter.data + change.to(parameter.dtype))


def make_adapter(base: Path, folder: Path, seed: int = 5, **settings) -> Path:
    """A trained adapter, written by PEFT."""
    model = peft.get_peft_model(read(base), peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | settings)))
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


def make_base(name: str, dtype: torch.dtype, folder: Path, shards: bool = True) -> Path:
    return save_base(make_model(name, dtype), folder, shards)


def save_base(model, folder: Path, shards: bool = True) -> Path:
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "optimizer.bin").write_bytes(b"pickle")
    return folder


def read(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights(folder: Path) -> dict:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def merged_in_memory(base: Path, adapters: dict[Path, float]):
    """The model with adapters folded in by `fastlora.merge`, as a plain one."""
    model = read(base)
    for index, (folder, weight) in enumerate(adapters.items()):
        fastlora.load(model, folder, adapter=f"adapter{index}")
        if weight != 1:
            fastlora.set_scale(model, f"adapter{index}", weight)
    fastlora.set_adapter(model, [f"adapter{index}" for index in range(len(adapters))])
    return fastlora.unload(model, merge=True)


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_FILE)


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
