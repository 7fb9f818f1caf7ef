"""Libraries that fastlora works inside of, each imported with its first use; and the calls that choose among them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from ..adapters.files import load as load_into_module_tree
from ..adapters.registry import adapters
from ..patch import patch as patch_module_tree
from ..patch import unload as unload_module_tree


@functools.wraps(patch_module_tree)
def patch(model: nn.Module, *arguments: Any, **settings: Any) -> nn.Module:
    return _install(_call(patch_module_tree, model, *arguments, **settings))


@functools.wraps(load_into_module_tree)
def load(model: nn.Module, *arguments: Any, **settings: Any) -> nn.Module:
    return _install(load_into_module_tree(model, *arguments, **settings))


@functools.wraps(unload_module_tree)
def unload(model: nn.Module, *arguments: Any, **settings: Any) -> nn.Module:
    model = _call(unload_module_tree, model, *arguments, **settings)
    if _is_of_transformers(model):
        from . import transformers

        transformers.uninstall(model)
    return model


def _install(model: nn.Module) -> nn.Module:
    """Makes a model with adapters of fastlora's work with transformers' Trainer, where it is one of theirs."""
    if _is_of_transformers(model) and adapters(model):
        from . import transformers

        transformers.install(model)
    return model


def _is_of_transformers(model: nn.Module) -> bool:
    # A model of transformers has imported this module; fastlora need not, and its import is not free.
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def _call(own: Callable[..., nn.Module], model: nn.Module, *arguments: Any, **settings: Any) -> nn.Module:
    """Calls a function of `fastlora.patch`, or its namesake for the library whose adapters the model has."""
    library = _library_of(model)
    if library is None:
        return own(model, *arguments, **settings)
    given = [name for name in inspect.signature(own).bind(model, *arguments, **settings).arguments if name != "model"]
    if given:
        raise ValueError(
            f"{', '.join(given)}: expected the model alone, as its adapters are PEFT's, found an argument more; "
            "PEFT's own methods add, change and merge them"
        )
    return getattr(library, own.__name__)(model)


def _library_of(model: nn.Module) -> ModuleType | None:
    """The integration that works on the model as it is: PEFT's for a PeftModel, or one with LoRA layers of PEFT."""
    # A model with PEFT's layers has imported PEFT; fastlora need not, and its import is not free.
    peft, layers = sys.modules.get("peft"), sys.modules.get("peft.tuners.lora.layer")
    if peft is None or layers is None:
        return None
    if not isinstance(model, peft.PeftModel) and not any(isinstance(m, layers.LoraLayer) for m in model.modules()):
        return None
    from . import peft as integration

    return integration
