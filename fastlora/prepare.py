"""Preparing a 16-bit or int8 model for training: float32 norms and logits, and checkpointed activations."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layers import Float32Head
from .models.targets import output_head

_PREPARED = "fastlora_prepared"
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class _Before:
    """What `undo_prepare` takes away or gives back."""

    hooks: list[RemovableHandle] = field(default_factory=list)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the norms' tensors by name
    head: Any = None
    use_cache: list[tuple[Any, bool]] = field(default_factory=list)  # by config
    switch: str | None = None  # the stem of the names of the methods for checkpointing, where it was used
    checkpointed: bool = False
    inputs_had_gradients: bool = False


def prepare_for_training(
    model: nn.Module, gradient_checkpointing: bool = True, checkpointing_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """Makes training in 16 bits more accurate and smaller, before or after `patch`.

    What PEFT's `prepare_model_for_kbit_training` is for, with less memory:

    - 16-bit norms get float32 weights and compute in float32. What they return has the model's dtype again, so the
      hidden states stay in 16 bits.
    - The output head computes float32 logits, from the 16-bit weight that it has: float32 would hold the same values.
      A head that carries an adapter or is not a plain `nn.Linear` stays as it is.
    - Activations are checkpointed, and the model keeps no cache of keys and values.

    Nothing is frozen or unfrozen: that is what `patch` does. Call `undo_prepare` before the model is saved as a whole.

    Args:
        gradient_checkpointing: whether to checkpoint.
        checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`; use_reentrant is False unless it is given here.

    Returns:
        The same model. One that was prepared before is prepared anew.

    Raises:
        ValueError: the model cannot be checkpointed, or there are checkpointing_kwargs for no checkpointing.
    """
    if checkpointing_kwargs and not gradient_checkpointing:
        raise ValueError(f"checkpointing_kwargs: expected with gradient_checkpointing, found {checkpointing_kwargs}")
    switch = checkpointing_switch(model) if gradient_checkpointing else None
    if _PREPARED in model.__dict__:
        undo_prepare(model)
    before = _Before()
    if switch is not None:
        _checkpoint(model, switch, {"use_reentrant": False} | (checkpointing_kwargs or {}), before)
    for name, module in model.named_modules():
        if _is_half_norm(module):
            _widen_norm(name, module, before)
    head = output_head(model)
    if head is not None and _is_plain_half_linear(model.get_submodule(head)):
        before.head = model.get_submodule(head)
        Float32Head.adopt(before.head)
    _keep_no_cache(model, before)
    model.__dict__[_PREPARED] = before
    return model


def undo_prepare(model: nn.Module) -> nn.Module:
    """Undoes `prepare_for_training`, and returns the same model; norms that were trained are rounded to 16 bits.

    Raises:
        ValueError: the model was not prepared.
    """
    if _PREPARED not in model.__dict__:
        raise ValueError(f"model: expected one that was prepared for training, found {type(model).__name__} as it was")
    before: _Before = model.__dict__.pop(_PREPARED)
    for handle in before.hooks:
        handle.remove()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, dtype in before.dtypes.items():
        tensors[name].data = tensors[name].data.to(dtype)
    if before.head is not None:
        before.head.release()
    for config, use_cache in before.use_cache:
        config.use_cache = use_cache
    if before.switch is not None:
        _stop_checkpointing(model, before.switch, before)
    return model


def checkpointing_switch(model: nn.Module) -> str:
    """The stem of the two methods that switch checkpointing on and off; transformers renamed them."""
    for stem in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(model, f"{stem}_enable") and getattr(model, "supports_gradient_checkpointing", False):
            return stem
    raise ValueError(
        f"gradient_checkpointing: expected a model that supports it, found {type(model).__name__}; pass "
        "gradient_checkpointing=False"
    )


def _checkpoint(model: Any, stem: str, arguments: dict[str, Any], before: _Before) -> None:
    before.switch = stem
    before.checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    before.inputs_had_gradients = bool(getattr(model, "_require_grads_hooks", None))
    model.disable_input_require_grads()
    getattr(model, f"{stem}_enable")(arguments)
    # A reentrant checkpoint whose inputs need no gradient computes none for its parameters either, so transformers
    # asks for one at the embeddings; any other would compute it for nothing.
    model.disable_input_require_grads()
    if arguments["use_reentrant"]:
        model.enable_input_require_grads()


def _stop_checkpointing(model: Any, stem: str, before: _Before) -> None:
    if not before.checkpointed:
        getattr(model, f"{stem}_disable")()
    model.disable_input_require_grads()
    if before.inputs_had_gradients:
        model.enable_input_require_grads()


def _keep_no_cache(model: nn.Module, before: _Before) -> None:
    """Also in the parts of a model, which may have configs of their own."""
    configs: dict[int, Any] = {
        id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")
    }
    for config in configs.values():
        before.use_cache.append((config, config.use_cache))
        config.use_cache = False


def _is_half_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return (
        "norm" in type(module).__name__.lower()  # every architecture has a class of its own for it
        and next(module.children(), None) is None
        and any(parameter.dtype in _HALF for parameter in own)
        and all(parameter.dim() <= 1 for parameter in own)
    )


def _is_plain_half_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.dtype in _HALF


def _widen_norm(name: str, module: nn.Module, before: _Before) -> None:
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.dtype in _HALF)
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dtype == dtype:
            before.dtypes[f"{name}.{key}"] = dtype
            tensor.data = tensor.data.float()
    before.hooks.append(module.register_forward_pre_hook(_take_float32))
    before.hooks.append(module.register_forward_hook(functools.partial(_return_in, dtype)))


def _take_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype in _HALF else x for x in inputs)


def _return_in(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(dtype)
