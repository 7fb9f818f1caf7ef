"""Libraries that fastlora works inside of, each imported with its first use; and the calls that choose among them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from ..patch import patch as patch_module_tree
from ..patch import unload as unload_module_tree


@functools.wraps(patch_module_tree)
def patch(model: nn.Module, *arguments: Any, **settings: Any) -> nn.Module:
    return _call(patch_module_tree, model, *arguments, **settings)


@functools.wraps(unload_module_tree)
def unload(model: nn.Module, *arguments: Any, **settings: Any) -> nn.Module:
    return _call(unload_module_tree, model, *arguments, **settings)


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
