"""Every initialisation, by PEFT and by fastlora, on the same tiny model and the same data."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import peft
import torch
from models import MODELS, make_batch, make_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastlora
from fastlora.adapters.registry import lora_layers

R, ALPHA, SEED = 4, 6, 5
ROWS = 4

# Every method, with each of its settings at work somewhere.
METHODS: dict[str, dict[str, Any]] = {
    **{name: dict(init_lora_weights=name) for name in ("orthogonal", "pissa", "pissa_niter_4", "olora")},
    **{f"corda-{m}": dict(init_lora_weights="corda", corda_config=dict(corda_method=m)) for m in ("ipm", "kpm")},
    **{
        f"lora-ga-{d}-{scale}": dict(init_lora_weights="lora_ga", lora_ga_config=dict(direction=d, scale=scale))
        for d, scale in (("ArB2r", "stable"), ("A2rBr", "weight_svd"), ("ArBr", "gd_scale"), ("random", "unit"))
    },
    **{
        f"loftq-{bits}-bits-{n}": dict(init_lora_weights="loftq", loftq_config=dict(loftq_bits=bits, loftq_iter=n))
        for bits, n in ((4, 1), (4, 3), (8, 1))
    },
    **{f"eva-rho-{rho}": dict(init_lora_weights="eva", eva_config=dict(rho=rho)) for rho in (1.0, 2.0)},
}
MOVED = {n: s for n, s in METHODS.items() if n.startswith(("pissa", "olora", "corda", "lora-ga"))}

# PEFT decomposes the transposed weight of a Conv1D, and the adapter does not fit its layer.
PEFT_HAS_NO_CONV1D = ("olora", "loftq")
_NESTED = {"eva_config": EvaConfig, "corda_config": CordaConfig, "lora_ga_config": LoraGAConfig}


@dataclasses.dataclass
class Start:
    """A layer at step 0: A, B, the frozen weight `[N, K]`, the scaling."""

    a: Tensor
    b: Tensor
    weight: Tensor
    scaling: float


def settings_of(name: str, **settings: Any) -> dict[str, Any]:
    return dict(r=R, lora_alpha=ALPHA, target_modules=MODELS[name][1]) | settings


def calibration(padded: bool = False) -> list[dict[str, Tensor]]:
    """Three batches; where padded, each row with its own number of tokens and a prompt without labels."""
    batches = [make_batch(tokens=16, batch=ROWS, seed=10 + index) for index in range(3)]
    if padded:
        for batch in batches:
            places = torch.arange(16)[None]
            mask = (places < torch.tensor([[16], [13], [9], [15]])).long()
            batch["attention_mask"] = mask
            batch["labels"] = batch["labels"].masked_fill((mask == 0) | (places < 2), -100)
    return batches


def needed_calibration(settings: dict[str, Any], padded: bool = False) -> list[dict[str, Tensor]] | None:
    return calibration(padded) if settings["init_lora_weights"] in ("eva", "corda", "lora_ga") else None


def by_fastlora(
    name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32, *, padded: bool = False,
    change: Callable = lambda model: model, quantize: str | None = None,
) -> nn.Module:  # fmt: skip
    """A patched model, whose base is `change`d before."""
    model = change(make_model(name, dtype))
    torch.manual_seed(SEED)
    config = fastlora.LoraConfig(**settings_of(name, **settings))
    return fastlora.patch(model, config=config, calibration=needed_calibration(settings, padded), quantize=quantize)


def by_peft(
    name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32, *, padded: bool = False,
    change: Callable = lambda model: model,
) -> peft.PeftModel:  # fmt: skip
    """The same by PEFT."""
    model, method = change(make_model(name, dtype)), settings["init_lora_weights"]
    config = peft_config(**settings_of(name, **settings))
    batches = needed_calibration(settings, padded)
    torch.manual_seed(SEED)
    if method == "corda":
        corda().preprocess_corda(model, config, lambda: [model(**row) for batch in batches for row in rows(batch)])
    if method == "lora_ga":
        peft.preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in batches])
    with loftq_allowed():
        wrapped = peft.get_peft_model(model, config)
    if method == "eva":
        peft.initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    return wrapped


def peft_config(**settings: Any) -> peft.LoraConfig:
    nested = {key: _NESTED[key](**values) for key, values in settings.items() if key in _NESTED}
    with loftq_allowed():
        return peft.LoraConfig(**settings | nested)


def corda() -> Any:
    """PEFT's module, which imports a package that PEFT does not depend on for a decorator that dataclasses has too."""
    if importlib.util.find_spec("attr") is not None:
        return importlib.import_module("peft.tuners.lora.corda")
    sys.modules["attr"] = types.SimpleNamespace(dataclass=dataclasses.dataclass)
    try:
        return importlib.import_module("peft.tuners.lora.corda")
    finally:
        del sys.modules["attr"]


def rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value[index : index + 1] for key, value in batch.items()} for index in range(ROWS)]


@contextmanager
def loftq_allowed() -> Iterator[None]:
    """PEFT's LoftQ computes on "cuda", whatever the model is on, and asks for scipy, which it does not use.

    Here "cuda" is the CPU where there is no GPU, and scipy is always found.
    """
    find = importlib.util.find_spec

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            here = lambda value: "cpu" if isinstance(value, str) and value == "cuda" else value  # noqa: E731
            return function(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})

    with (
        mock.patch("importlib.util.find_spec", lambda name, *more: name == "scipy" or find(name, *more)),
        nullcontext() if torch.cuda.is_available() else Mode(),
    ):
        yield


def starts(model: nn.Module, adapter: str = "default") -> dict[str, Start]:
    """Every adapted layer by name."""
    if not isinstance(model, peft.PeftModel):
        return {
            name: Start(layer.lora_A[adapter].detach(), layer.lora_B[adapter].detach(), layer.frozen_weight.detach(),
                        layer.scaling[adapter])
            for name, layer in lora_layers(model).items()
        }  # fmt: skip
    layers = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    return {
        name: Start(layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach(),
                    stored_as_linear(layer.base_layer).detach(), layer.scaling[adapter])
        for name, layer in layers.items()
    }  # fmt: skip


def stored_as_linear(module: nn.Module) -> Tensor:
    """The weight `[N, K]` of a linear layer or a Conv1D."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def original_weights(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    modules = {n: m for n, m in make_model(name, dtype).named_modules() if getattr(m, "weight", None) is not None}
    return {n: stored_as_linear(m).detach() for n, m in modules.items() if m.weight.dim() == 2}


def disturb(model: nn.Module, seed: int = 3) -> nn.Module:
    """The adapter as training may have left it: a tenth of its size away, the same for every model of one shape."""
    generator = torch.Generator().manual_seed(seed)
    for _, start in sorted(starts(model).items()):
        for weight in (start.a, start.b):
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * 0.1 * weight.square().mean().sqrt().clamp(min=0.01))
    return model
