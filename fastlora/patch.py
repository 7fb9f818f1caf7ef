"""Putting adapters on a model, and taking everything off again."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .adapters import trained
from .adapters.base_embeddings import give_embeddings_back, keep_embeddings
from .adapters.registry import (
    ACTIVE,
    REGISTRY,
    active_adapters,
    adapters,
    check_addable,
    lora_layers,
    patched_layers,
    set_adapter,
)
from .adapters.tokens import attach_tokens, find_tokens, initial_rows
from .compute import check_compute, put_compute
from .config import LoraConfig
from .inits import PLAIN_INITS, Initial, check_no_calibration, initial_adapters, with_found_ranks
from .layers import (
    LinearLayer,
    LoraLayer,
    adopt,
    dissolve_gated,
    dissolve_groups,
    form_gated,
    form_groups,
    kind_of,
    replace_weight,
)
from .layers.base import Parts
from .log import logger
from .models.distributed import check_whole
from .models.replication import replicated, undo_replication
from .models.targets import check_settings, find_targets, output_head, rank_of, scaling_of
from .models.ties import check_foldable, tie_config, untie_config
from .quantize import check_quantizable, give_back_to_bitsandbytes, take_over_bitsandbytes

_TRAINED_BEFORE = "fastlora_trained_before"


def patch(
    model: nn.Module,
    r: int = 8,
    targets: list[str] | str | None = None,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    quantize: str | None = None,
    compute: str | None = None,
    adapter: str = "default",
    config: Any = None,
    allow_output_head: bool = False,
    calibration: Any = None,
) -> nn.Module:
    """Puts a LoRA adapter on a model's layers and freezes everything else.

    Each target becomes a layer that computes `W x + bias + alpha / r * B A dropout(x)` (LoRA, Hu et al. 2021).
    A starts Kaiming uniform and B at zero, drawn from torch's generator in PEFT's order, so that one seed gives
    PEFT's adapter; `config.init_lora_weights` chooses other ways. The new adapter becomes the active one.

    "pissa", "olora", "corda", "lora_ga" and "loftq" change the targets' frozen weights. The original ones stay in
    memory besides, dense, for `unload` and `disabled`; those of a mapped file cost none. Such an adapter is the only
    one that the model takes.

    A model that has LoRA layers of PEFT, such as a `peft.PeftModel`, is passed alone: it keeps its adapters and its
    methods, and its layers run on fastlora's ops (`fastlora.integrations.peft`).

    Args:
        model: any module tree with layers of the kinds in `fastlora.layers`: linear ones, also of transformers and
            bitsandbytes, embeddings, convolutions, attention; `config.target_parameters` adapts single parameters.
        r: rank.
        targets: a list of names or dotted suffixes, one regular expression for whole names, "all-linear", or None
            for the architecture's default.
        alpha: the low-rank part is scaled by alpha / r; None means r.
        dropout: probability to drop an element of the low-rank part's input while training.
        quantize: "int8" stores the frozen weights of linear targets as int8 with a scale per output feature.
        compute: "int8" multiplies int8 weights with activations in int8, as `set_compute` says; None leaves that as it
            is.
        adapter: the adapter's name.
        config: a `LoraConfig`, or a `peft.LoraConfig`, in place of r, targets, alpha and dropout.
        calibration: batches of the model's keyword arguments, such as a DataLoader, for the initialisations that look
            at data: "eva", "corda", and "lora_ga", which needs labels among them. The model runs on them as it is.
        allow_output_head: accept the model's output head as a target.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: an argument does not fit the model; the model is then as it was.
    """
    config = _config(r, targets, alpha, dropout, config)
    with replicated(model, config, adapters(model)):
        _add_new(model, config, quantize, compute, adapter, allow_output_head, calibration)
    return model


def _add_new(
    model: nn.Module, config: LoraConfig, quantize: str | None, compute: str | None, adapter: str,
    allow_output_head: bool, calibration: Any,
) -> None:  # fmt: skip
    """Adds an adapter of a config with initial tensors, after every check."""
    config, modules = find_targets(model, config)
    _check(model, modules, config, quantize, adapter, allow_output_head)
    check_compute(modules, quantize, compute)
    check_settings(modules, config)
    tokens = find_tokens(model, config, modules)
    if config.init_lora_weights in PLAIN_INITS:
        check_no_calibration(config.init_lora_weights, calibration)
        initial = None
        parts = {name: _initial_parts(module, name, config) for name, module in modules.items()}
    else:
        initial = initial_adapters(model, modules, config, calibration)
        config, modules = with_found_ranks(config, modules, initial)
        parts = {name: start.parts(config.lora_bias) for name, start in initial.items()}
    parts |= initial_rows(model, tokens)
    attach(model, modules, parts, config, adapter, quantize, initial=initial, compute=compute)


def attach(
    model: nn.Module,
    modules: dict[str, Any],
    weights: dict[str, Parts],
    config: LoraConfig,
    adapter: str,
    quantize: str | None = None,
    trainable: bool = True,
    copies: dict[str, Tensor] | None = None,
    activate: bool = True,
    initial: Mapping[str, Initial] | None = None,
    compute: str | None = None,
) -> None:
    """Adds an adapter with given tensors to checked modules, the active one by default.

    Args:
        initial: the adapter's start, where that changed the frozen weight.
        copies: values for parameters of the model that train with the adapter; others start from the model's.
    """
    names = trained.names_to_train(model, config, list(modules))
    _freeze(model)
    take_over_bitsandbytes(model)
    layers = {name: adopt(module) for name, module in modules.items()}
    for name, layer in layers.items():
        start = (initial or {}).get(name)
        if start is not None and start.weight is not None:
            replace_weight(layer, start.weight, start.a, start.b)
        if quantize == "int8" and isinstance(layer, LinearLayer) and layer.weight_scale is None:
            layer.quantize()
        scaling = scaling_of(config, name)
        layer.add_adapter(adapter, weights[name], scaling, config.lora_dropout, trainable)
        if config.use_dora and not layer.has_magnitude(adapter):
            layer.add_magnitude(adapter, trainable)
    if compute is not None:
        put_compute(lora_layers(model).values(), compute)
    form_groups(model)
    form_gated(model)
    attach_tokens(model, config, weights, adapter, trainable)
    trained.add_copies(model, adapter, names, copies or {}, config, trainable)
    model.__dict__.setdefault(REGISTRY, {})[adapter] = config
    if activate:
        set_adapter(model, adapter)
    _log_paths(adapter, layers.values())


def _log_paths(adapter: str, layers: Iterable[LoraLayer]) -> None:
    """Says which implementation computes the new adapter's layers."""
    kinds = Counter(
        (layer.weight_device, layer.dense_dtype, getattr(layer, "weight_scale", None) is not None, layer.computed_by())
        for layer in layers
    )
    for (device, dtype, int8, computed_by), count in kinds.items():
        weights = f"{str(dtype).removeprefix('torch.')}{' stored as int8' if int8 else ''}"
        logger.info("adapter %r on %d layers, weights in %s; %s", adapter, count, weights, computed_by)
        if ops.is_slow(device, dtype):
            _warn_of_slow_dtype(dtype)


@functools.cache
def _warn_of_slow_dtype(dtype: torch.dtype) -> None:
    logger.warning(
        "this CPU has no kernels for %s: fastlora's layers compute in float32 instead, but the rest of the model is "
        "slow in it; load the model with dtype=torch.float32", dtype,
    )  # fmt: skip


def unload(model: nn.Module, merge: bool = False) -> nn.Module:
    """Takes every adapter off: the modules are of the classes they had before `patch`, and train if they did.

    A model of PEFT is passed alone and keeps its adapters, which run as PEFT runs them again.

    Args:
        merge: fold the active adapter into the weights first. A weight that `patch` quantised comes back dense
            either way, with the adapter added to it before any rounding.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched, an adapter cannot be folded into its layer, a merged weight would not be
            finite, or a merge did not keep the weights that are to come back; nothing changes then.
    """
    layers = patched_layers(model)
    check_whole(model)
    if merge:
        check_foldable(model)
    else:
        for layer in layers.values():
            layer.check_base_kept("unload")
    dissolve_groups(model)
    dissolve_gated(model)
    trained.release(model, active_adapters(model), keep=merge)
    for layer in layers.values():
        layer.release(merge)
    trained_before = model.__dict__.pop(_TRAINED_BEFORE)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in trained_before)
    del model.__dict__[REGISTRY], model.__dict__[ACTIVE]
    if merge:
        untie_config(model, for_good=True)
        keep_embeddings(model)
    else:
        tie_config(model)
        give_embeddings_back(model)
    undo_replication(model, keep=merge)
    give_back_to_bitsandbytes(model)
    return model


def _config(r: int, targets: list[str] | str | None, alpha: float | None, dropout: float, config: Any) -> LoraConfig:
    if config is None:
        return LoraConfig(
            r=r, target_modules=targets, lora_alpha=r if alpha is None else alpha, lora_dropout=dropout
        )  # fmt: skip
    if (r, targets, alpha, dropout) != (8, None, None, 0.0):
        raise ValueError("config: expected either a config or r, targets, alpha and dropout, found both")
    if isinstance(config, LoraConfig):
        return config
    if callable(getattr(config, "to_dict", None)):
        return LoraConfig.from_peft(config)
    raise TypeError(f"config: expected a LoraConfig, found {type(config).__name__}")


def _check(
    model: nn.Module,
    modules: dict[str, Any],
    config: LoraConfig,
    quantize: str | None,
    adapter: str,
    allow_output_head: bool,
) -> None:
    check_addable(model, adapter)
    head = output_head(model)
    if head in modules and not allow_output_head:
        raise ValueError(
            f"targets: expected no output head, found {head!r}; trainers that read its weight to compute the loss "
            "would leave the adapter untrained without a word; pass allow_output_head=True to adapt it all the same"
        )
    check_quantizable(model, modules, quantize)
    trained.names_to_train(model, config, list(modules))


def _initial_parts(module: Any, name: str, config: LoraConfig) -> Parts:
    """The tensors of a new adapter in float32, drawn in PEFT's order from torch's CPU generator."""
    kind = kind_of(module)
    assert kind is not None, "find_targets lets no other module through"
    parts = kind.draw(module, rank_of(config, name), config.init_lora_weights, config.lora_bias)
    # PEFT moves a new adapter to the dtype of a dense weight, then back to float32.
    dtype = kind.dtype_of(module)
    dtype = dtype if dtype.is_floating_point else torch.float32
    return {part: tensor.to(dtype).float() for part, tensor in parts.items()}


def _freeze(model: nn.Module) -> None:
    """Freezes the model the first time it is patched, and notes what trained."""
    if _TRAINED_BEFORE in model.__dict__:
        return
    named = model.named_parameters(remove_duplicate=False)  # merging may separate those that are tied
    trained_before = {name for name, parameter in named if parameter.requires_grad}
    model.__dict__[_TRAINED_BEFORE] = trained_before
    model.requires_grad_(False)
