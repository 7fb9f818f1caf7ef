"""A new adapter out of several: the weighted combination of LoRA adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoraConfig
from ..layers import LinearLayer, LoraLayer
from ..models.targets import shortest_targets
from ..patch import attach
from .registry import adapters as adapter_configs
from .registry import check_new_name, check_unmerged, patched_layers
from .task_vectors import RULES, Pruning, factorize, factorize_product, merge_vectors
from .trained import copies_of

_ON_DELTAS = ("svd", *(f"{rule}_svd" for rule in RULES if rule != "linear"))
METHODS = ("cat", *RULES, *_ON_DELTAS)
MAJORITY_SIGNS = ("total", "frequency")


BEYOND_A_AND_B = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")


class _Part(NamedTuple):
    """One adapter's share in a layer: A `[R, K]`, B `[N, R]`, its weight in the combination and its scaling."""

    adapter: str
    a: Tensor
    b: Tensor
    weight: float
    scaling: float


@torch.no_grad()
def combine(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    method: str = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    generator: torch.Generator | None = None,
    trainable: bool = False,
) -> nn.Module:
    """Adds an adapter that combines others with weights, as PEFT's `add_weighted_adapter`; it is not made active.

    With the deltas `D_i = scaling_i * B_i A_i` of the adapters and `D = B A` of the new one, whose scaling is 1:

    - "cat": `D = sum_i w_i D_i`, of the summed ranks.
    - "svd": the same sum, cut to `rank` by its largest singular values.
    - "linear": A is the sum of the `sign(f_i) sqrt|f_i| A_i` and B that of the `sqrt|f_i| B_i`, with
      `f_i = w_i scaling_i`. Cheap and rough: D also holds the products of one adapter's B with another's A.
    - "ties", "dare_linear", "dare_ties", "magnitude_prune": that rule in place of the sums of "linear"; the papers
      are named in `task_vectors`.
    - the same names with "_svd": that rule on the D_i, weighted by the w_i, then cut to `rank`.

    An adapter that a layer does not have counts there as zero. Unlike PEFT's, the result is right for adapters with
    rsLoRA scaling, and a single adapter is combined by the method that was asked for.

    Args:
        adapters: names of adapters of the model, at least one.
        weights: one finite number per adapter, of any sign.
        name: the new adapter's name.
        method: see above.
        rank: for "svd" and the "_svd" methods; None means the largest rank of the adapters.
        density: for the methods that prune: the share of elements they keep, in (0, 1].
        majority_sign: for "ties" methods: an element's sign is that of the sum ("total") or of most ("frequency").
        generator: for "dare" methods, on the device of the adapters.
        trainable: whether the new adapter trains once it is active.

    Returns:
        The same model.

    Raises:
        ValueError: an argument does not fit the model or another argument, two adapters have different ranks in a
            layer where the method adds them up, or a weight is not finite; nothing is changed then.
    """
    layers = patched_layers(model)
    check_new_name(model, name)
    check_unmerged(model)
    _check_adapters(model, adapters, weights)
    _check_method(method, rank, density, majority_sign)
    rank = rank or _default_rank([adapter_configs(model)[adapter] for adapter in adapters], method)
    pruning = None if density is None else Pruning(density, generator)
    for n, layer in layers.items():
        if not isinstance(layer, LinearLayer) and any(layer.has(adapter) for adapter in adapters):
            raise ValueError(f"adapters: expected adapters on linear layers, found one on {n!r}")
    parts = {n: _parts(layer, adapters, weights) for n, layer in layers.items()}
    parts = {n: found for n, found in parts.items() if found}
    _check_parts(parts, method)
    pairs = {n: _padded(*_combined(found, method, rank, pruning, majority_sign), rank) for n, found in parts.items()}
    for n, pair in pairs.items():
        _check_finite(pair, f"the combined adapter in {n!r}")
    tensors = {n: {"lora_A.weight": a, "lora_B.weight": b} for n, (a, b) in pairs.items()}
    config = _config(model, adapter_configs(model)[adapters[0]], list(tensors), rank, trainable)
    attach(model, {n: layers[n] for n in tensors}, tensors, config, name, trainable=trainable, activate=False)
    return model


def _check_adapters(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> None:
    known = sorted(adapter_configs(model))
    if not adapters or isinstance(adapters, str):
        raise ValueError(f"adapters: expected a list of some of {known}, found {adapters!r}")
    for adapter in adapters:
        if adapter not in known:
            raise ValueError(f"adapters: expected some of {known}, found {adapter!r}")
        config = adapter_configs(model)[adapter]
        extras = [field for field in BEYOND_A_AND_B if getattr(config, field)]
        if extras or copies_of(model, adapter):
            raise ValueError(
                f"adapters: expected A and B alone, found {adapter!r} with {extras or 'trained parameters'}"
            )
    if len(weights) != len(adapters):
        raise ValueError(f"weights: expected one for each of {len(adapters)} adapters, found {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights: expected finite numbers, found {list(weights)}")


def _check_method(method: str, rank: int | None, density: float | None, majority_sign: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, found {method!r}")
    if majority_sign not in MAJORITY_SIGNS:
        raise ValueError(f"majority_sign: expected one of {MAJORITY_SIGNS}, found {majority_sign!r}")
    if rank is not None and method not in _ON_DELTAS:
        raise ValueError(f"rank: expected None for {method!r}, which leaves no choice, found {rank!r}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank: expected a whole number of at least 1, found {rank!r}")
    prunes = method not in ("cat", "linear", "svd")
    if prunes and (density is None or not 0 < density <= 1):
        raise ValueError(f"density: expected 0 < density <= 1 for {method!r}, found {density!r}")
    if not prunes and density is not None:
        raise ValueError(f"density: expected None for {method!r}, which prunes nothing, found {density!r}")


def _default_rank(configs: list[LoraConfig], method: str) -> int:
    ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
    return sum(ranks) if method == "cat" else max(ranks)


def _parts(layer: LoraLayer, adapters: Sequence[str], weights: Sequence[float]) -> list[_Part]:
    """The shares of those adapters that the layer has, in float32 or wider."""
    dtype = torch.promote_types(layer.dense_dtype, torch.float32)
    return [
        _Part(adapter, layer.lora_A[adapter].to(dtype), layer.lora_B[adapter].to(dtype), weight, layer.scaling[adapter])
        for adapter, weight in zip(adapters, weights, strict=True)
        if adapter in layer.lora_A
    ]


def _check_parts(parts: dict[str, list[_Part]], method: str) -> None:
    for name, found in parts.items():
        for part in found:
            _check_finite((part.a, part.b), f"adapter {part.adapter!r} in {name!r}")
            if method in RULES and part.a.shape != found[0].a.shape:
                raise ValueError(
                    f"adapters: expected equal ranks for {method!r}, found {found[0].a.shape[0]} of "
                    f"{found[0].adapter!r} and {part.a.shape[0]} of {part.adapter!r} in {name!r}"
                )


def _check_finite(tensors: tuple[Tensor, Tensor], what: str) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(f"{what}: expected finite weights, found inf or nan")


def _combined(
    parts: list[_Part], method: str, rank: int, pruning: Pruning | None, majority_sign: str
) -> tuple[Tensor, Tensor]:
    """A and B of the new adapter in one layer, of its natural rank."""
    factors = [part.weight * part.scaling for part in parts]
    if method in RULES:
        roots = [math.sqrt(abs(factor)) for factor in factors]
        signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
        a = merge_vectors([part.a for part in parts], signed, method, pruning, majority_sign)
        b = merge_vectors([part.b for part in parts], roots, method, pruning, majority_sign)
        return a, b
    if method in ("cat", "svd"):
        a = torch.cat([factor * part.a for factor, part in zip(factors, parts, strict=True)])
        b = torch.cat([part.b for part in parts], dim=1)
        return (a, b) if method == "cat" else factorize_product(a, b, rank)
    deltas = [part.b @ part.a * part.scaling for part in parts]
    weights = [part.weight for part in parts]
    return factorize(merge_vectors(deltas, weights, method.removesuffix("_svd"), pruning, majority_sign), rank)


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B with zeros up to the rank that the adapter has in every layer."""
    missing = rank - a.shape[0]
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))


def _config(model: nn.Module, first: LoraConfig, names: list[str], rank: int, trainable: bool) -> LoraConfig:
    """The first adapter's settings, with targets that select just these layers and a scaling of 1."""
    return replace(
        first,
        r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={},
        target_modules=shortest_targets(names, dict(model.named_modules())), exclude_modules=None,
        layers_to_transform=None, layers_pattern=None, bias="none", modules_to_save=None,
        trainable_token_indices=None, target_parameters=None,
        inference_mode=not trainable,
    )  # fmt: skip
