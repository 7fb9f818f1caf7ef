"""Parts of a Llama-8B layer with adapters, the same random weights for every contender."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from gpu import Calls
from gpu_layers import ALPHA, BF16, Place, backward_too, fill_adapters
from memory import bytes_for_backward
from peers import bitsandbytes_linear, imported
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import fastlora

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 4096, 14336, 32, 8, 1024


class Readers(nn.Module):
    """Linear layers that read one tensor, such as q, k and v."""

    def __init__(self, K: int, outputs: dict[str, int]) -> None:
        super().__init__()
        for name, N in outputs.items():
            self.add_module(name, nn.Linear(K, N, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


class SevenLinears(nn.Module):
    """The linears of a Llama layer on random inputs, without what is between them."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        hidden, inner, values = place.size(HIDDEN), place.size(INTERMEDIATE), place.size(HIDDEN // 4)
        self.attention = Readers(hidden, {"q_proj": hidden, "k_proj": values, "v_proj": values})
        self.output = Readers(hidden, {"o_proj": hidden})
        self.expand = Readers(hidden, {"gate_proj": inner, "up_proj": inner})
        self.contract = Readers(inner, {"down_proj": hidden})

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        parts = self.attention, self.output, self.expand, self.contract
        return [y for part, x in zip(parts, inputs, strict=True) for y in part(x)]


class LinearsAndActivation(nn.Module):
    """The linears of a Llama layer and its activation, each read as there, without norms and attention."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        hidden, inner, values = place.size(HIDDEN), place.size(INTERMEDIATE), place.size(HIDDEN // 4)
        self.attention = Readers(hidden, {"q_proj": hidden, "k_proj": values, "v_proj": values})
        self.output = Readers(hidden, {"o_proj": hidden})
        self.mlp = LlamaMLP(transformers.LlamaConfig(hidden_size=hidden, intermediate_size=inner))

    def forward(self, x: Tensor, attended: Tensor, normed: Tensor) -> list[Tensor]:
        return [*self.attention(x), *self.output(attended), self.mlp(normed)]


def held_by_linears(adapt: Adapt, place: Place, count: int) -> int:
    """Bytes that they keep for the backward of so many tokens."""
    model = made(lambda: LinearsAndActivation(place), adapt, place)
    inputs = [tokens(place, count, HIDDEN, seed)[None].requires_grad_() for seed in range(3)]
    # A sum keeps nothing of its own.
    return bytes_for_backward(model, lambda: torch.stack([y.sum() for y in model(*inputs)]).sum())


def llama_layer(place: Place) -> nn.Module:
    """A Llama of one layer with the sizes of an 8B model and few words."""
    config = transformers.LlamaConfig(
        hidden_size=place.size(HIDDEN), intermediate_size=place.size(INTERMEDIATE), num_hidden_layers=1,
        num_attention_heads=4 if place.tiny else HEADS, num_key_value_heads=1 if place.tiny else KEY_VALUE_HEADS,
        vocab_size=VOCABULARY, max_position_embeddings=8192, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


Make = Callable[[], nn.Module]
Adapt = Callable[[nn.Module], nn.Module]


def made(make: Make, adapt: Adapt, place: Place) -> nn.Module:
    """A model with weights that are the same at every call, frozen and adapted."""
    torch.manual_seed(0)
    with torch.device(place.device):
        model = make()
    return adapt(model.to(BF16).requires_grad_(False)).train()


def frozen(model: nn.Module) -> nn.Module:
    return model


def ours(model: nn.Module, quantize: str | None = None, p: float = 0.05) -> nn.Module:
    targets = present(model)
    return fill_adapters(fastlora.patch(model, r=16, targets=targets, alpha=ALPHA, dropout=p, quantize=quantize))


def ours_int8(model: nn.Module) -> nn.Module:
    return ours(model, "int8")


def peft_model(model: nn.Module, fp32: bool = False, int8: bool = False, p: float = 0.05) -> nn.Module:
    peft, targets = imported("peft"), present(model)
    if int8:
        for name in [name for name, module in model.named_modules() if name.rsplit(".")[-1] in targets]:
            linear: Any = model.get_submodule(name)
            model.set_submodule(name, bitsandbytes_linear(linear, linear.weight.device))
        model.is_loaded_in_8bit = True  # type: ignore[assignment]
    config = peft.LoraConfig(r=16, lora_alpha=ALPHA, lora_dropout=p, target_modules=targets)
    return fill_adapters(peft.get_peft_model(model, config, autocast_adapter_dtype=fp32))


def peft_fp32(model: nn.Module) -> nn.Module:
    return peft_model(model, fp32=True)


def peft_int8(model: nn.Module) -> nn.Module:
    return peft_model(model, int8=True)


def present(model: nn.Module) -> list[str]:
    names = {name.rsplit(".")[-1] for name, _ in model.named_modules()}
    return [target for target in TARGETS if target in names]


def step(make: Make, adapt: Adapt, place: Place, inputs: list[Tensor], autocast: bool = False) -> Calls:
    """One call: forward and backward of a module's outputs, with random gradients."""
    model = made(make, adapt, place)
    with torch.no_grad(), torch.autocast(place.device, BF16, enabled=autocast):
        outputs = model(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator(place.device).manual_seed(7)
    gradients = [torch.randn(y.shape, generator=generator, device=place.device).to(y.dtype) for y in outputs]
    return [backward_too(model, [x.clone() for x in inputs], gradients, autocast)]


def tokens(place: Place, count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(place.device).manual_seed(seed)
    return torch.randn(place.size(count), place.size(width), generator=generator, device=place.device).to(BF16)


class Embedded(nn.Module):
    """A language model called on embeddings; its output is what the layer gives, before the head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.model(inputs_embeds=x, use_cache=False).last_hidden_state  # type: ignore[operator, union-attr]
