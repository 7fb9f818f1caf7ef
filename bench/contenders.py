"""The models that race each other, all made from one set of random weights, and what they do in a race.

The model is a Llama of 4 layers with hidden 1024, intermediate 2752, 16 heads and 4 key-value heads. Its vocabulary
has 1024 words, so that the output head, which no adapter touches, stays a small part of the step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable

import peft
import torch
import transformers
from peers import bitsandbytes_linear
from torch import Tensor, nn

import fastlora
from fastlora_kernels.cpu import product_dtype

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 1024
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
}
BF16 = torch.bfloat16
NATIVE = product_dtype(BF16)  # the dtype that people train in on this CPU


@functools.cache
def _base(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    # Rounded to bf16 in every dtype, so that a wider model is an exact reference for a narrower one.
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, pad_token_id=0)).to(BF16).to(dtype)


def base(dtype: torch.dtype = BF16) -> nn.Module:
    """A fresh copy of the model without adapters, frozen."""
    return copy.deepcopy(_base(dtype)).requires_grad_(False)


def with_fastlora(
    r: int = 16, p: float = 0.1, quantize: str | None = None, dtype: torch.dtype = BF16, model: nn.Module | None = None
) -> nn.Module:
    model = base(dtype) if model is None else model
    fastlora.patch(model, r=r, targets=TARGETS, alpha=2 * r, dropout=p, quantize=quantize)
    return _fill_adapters(model)


def with_peft(
    r: int = 16, p: float = 0.1, dtype: torch.dtype = BF16, fp32_adapters: bool = False, int8: bool = False,
    model: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    model = base(dtype) if model is None else model
    if int8:
        _quantize_with_bitsandbytes(model)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=TARGETS)
    return _fill_adapters(peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters))


def _quantize_with_bitsandbytes(model: nn.Module) -> None:
    """Does to a model in memory what transformers does to a checkpoint with `load_in_8bit`."""
    for name, module in list(model.named_modules()):
        if name.rsplit(".")[-1] in TARGETS:
            model.set_submodule(name, bitsandbytes_linear(module, "cpu"))
    model.is_loaded_in_8bit = True


def _fill_adapters(model: nn.Module) -> nn.Module:
    """Gives A and B the same random values in every contender: B would start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def exact_model_of(int8_model: nn.Module) -> nn.Module:
    """A float32 PEFT model with the weights that the codes of a fastlora model stand for."""
    exact = with_peft(dtype=torch.float32)
    for name, layer in int8_model.named_modules():
        if getattr(layer, "weight_scale", None) is not None:
            weight = layer.weight.float() * layer.weight_scale[:, None]
            exact.get_submodule(f"base_model.model.{name}").base_layer.weight.data.copy_(weight)
    return exact


def make_ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(2))


def training_loss(model: nn.Module, ids: Tensor, autocast: bool = False) -> Callable[[], Tensor]:
    """A forward with dropout; for every contender alike the embeddings' output asks for a gradient."""
    model.train()
    embeddings = model.get_input_embeddings()

    def loss() -> Tensor:
        inputs = embeddings(ids).detach().requires_grad_()
        with torch.autocast("cpu", BF16) if autocast else contextlib.nullcontext():
            return model(inputs_embeds=inputs, labels=ids, use_cache=False).loss

    return loss


def training_step(model: nn.Module, ids: Tensor, autocast: bool = False) -> Callable[[], None]:
    """`training_loss` and its backward, without an optimizer step."""
    loss = training_loss(model, ids, autocast)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        for parameter in trainable:
            parameter.grad = None
        loss().backward()

    return step


def loss_and_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Logits, loss, the inputs' gradient and the first layer's adapter gradients, without dropout."""
    model.eval()
    model.zero_grad()
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=inputs, labels=ids, use_cache=False)
    output.loss.backward()
    adapters = [p.grad for n, p in model.named_parameters() if "layers.0." in n and "lora_" in n]
    found = {"loss": output.loss.detach(), "logits": output.logits.detach(), "gradient of the inputs": inputs.grad}
    return found | {"gradients of the adapters": torch.cat([g.flatten().float() for g in adapters])}


def decode_step(model: nn.Module, context: int) -> Callable[[], Tensor]:
    """One token through the model behind a cache of `context` tokens; returns its logits."""
    model.eval()
    ids = make_ids(1, context + 1)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values

    @torch.no_grad()
    def step() -> Tensor:
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step


def generation(model: nn.Module, prompt: int, new_tokens: int) -> Callable[[], Tensor]:
    """Greedy `model.generate` of exactly `new_tokens`."""
    model.eval()
    ids = make_ids(1, prompt)
    arguments = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
