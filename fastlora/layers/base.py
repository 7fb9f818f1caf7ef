"""What every layer with adapters has in common: its adapters, which of them run, and folding them into the weights.

A model's own module becomes a LoRA layer by changing its class: it keeps its identity, its place, its hooks and
its parameters' names, and changing the class back undoes it.
"""

from __future__ import annotations

import types
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from .folding import Foldable
from .mixed import Mix

Parts = dict[str, Tensor]  # the tensors of one adapter in one layer, by the names they have in PEFT's files


class LoraLayer(Foldable):
    """A frozen module with named LoRA adapters, any number of which are active.

    A kind of layer is a subclass. It says which modules it takes and which shapes an adapter has there, computes,
    and folds adapters into parameters.

    Attributes:
        lora_A, lora_B, lora_B_bias, lora_magnitude: parameters by adapter name; the last two only where used.
        scaling, lora_dropout: the factor of `B A` and the dropout probability by adapter name.
        active_adapters: the adapters in use, in order.
        adapters_enabled: False while adapters are switched off.
        original_class: the module's class before it became a LoRA layer.
        dense_dtype: the dtype of the weight before it was quantised.
    """

    PARTS: ClassVar[dict[str, str]] = {
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora_B.bias": "lora_B_bias",
        "lora_magnitude_vector": "lora_magnitude",
    }

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_B_bias: nn.ParameterDict
    lora_magnitude: nn.ParameterDict
    scaling: dict[str, float]
    lora_dropout: dict[str, float]
    active_adapters: tuple[str, ...]
    adapters_enabled: bool
    original_class: type[nn.Module]
    dense_dtype: torch.dtype

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether this kind takes the module."""
        raise NotImplementedError

    @classmethod
    def class_for(cls, original: type[nn.Module]) -> type[LoraLayer]:
        """The class that a module of an original class gets: both, unless the kind needs nothing of the original."""
        return class_of(cls, original)

    @classmethod
    def shapes(cls, module: Any, rank: int) -> dict[str, list[int]]:
        """The shape of each tensor that an adapter can have on the module, adapted or not."""
        raise NotImplementedError

    @classmethod
    def dtype_of(cls, module: Any) -> torch.dtype:
        """The dtype of a module's weight, to which PEFT rounds a new adapter."""
        return module.weight.dtype

    @classmethod
    def check(cls, module: Any, name: str, rank: int, dropout: float, dora: bool, bias: bool) -> None:
        """Raises ValueError where an adapter of these settings cannot go on the module of this name."""

    @classmethod
    def draw(cls, module: Any, rank: int, init: bool | str, bias: bool) -> Parts:
        """The initial tensors of an adapter, drawn in PEFT's order from torch's CPU generator.

        Args:
            init: True, False or "gaussian", as in `LoraConfig.init_lora_weights`.
            bias: whether B has a bias.
        """
        raise NotImplementedError

    def setup(self) -> None:
        """What the kind does besides when it takes a module."""

    def check_active(self, adapters: tuple[str, ...]) -> None:
        """Raises ValueError where adapters cannot be active at once."""

    def computed_by(self, place: ops.Place | None = None) -> str:
        """Which implementation computes here or in another place, and why no kernel does if none does, in words."""
        return f"PyTorch: there are no kernels for adapters on {self.original_class.__name__}"

    @property
    def weight_device(self) -> torch.device:
        return next(self.parameters()).device

    def name_in_files(self, name: str, adapter: str) -> str:
        """What PEFT's files call a layer that the model calls `name`."""
        return name

    def name_in_config(self, name: str) -> str:
        """What an adapter's patterns match for a layer that the model calls `name`."""
        return name

    def has(self, adapter: str) -> bool:
        return adapter in self.lora_A

    def running_adapters(self) -> tuple[str, ...]:
        """The adapters that the next call computes."""
        return self.active_adapters if self.adapters_enabled and not self.merged_adapters else ()

    def parts(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by the names they have in PEFT's files."""
        found = {part: getattr(self, attribute) for part, attribute in self.PARTS.items()}
        return {part: parameters[adapter] for part, parameters in found.items() if adapter in parameters}

    def add_adapter(self, name: str, parts: Parts, scaling: float, dropout: float, trainable: bool = True) -> None:
        """Adds an adapter, on the device of the weight; 16-bit models get float32 adapters, as in PEFT."""
        dtype, device = torch.promote_types(self.dense_dtype, torch.float32), self.weight_device
        for part, tensor in parts.items():
            parameter = nn.Parameter(tensor.to(device, dtype), requires_grad=trainable)
            getattr(self, self.PARTS[part])[name] = parameter
        self.scaling[name], self.lora_dropout[name] = scaling, dropout

    def has_magnitude(self, adapter: str) -> bool:
        return adapter in self.lora_magnitude

    def add_magnitude(self, adapter: str, trainable: bool = True) -> None:
        """Gives an adapter DoRA's magnitude, so that at first it changes nothing.

        Raises:
            TypeError: this kind of layer has no DoRA.
        """
        raise TypeError(f"use_dora: expected linear layers, found {self.original_class.__name__}")

    def mix_adapters(self, mix: Mix | None) -> None:
        """Gives each row of the batch its own adapter, until called with None.

        Raises:
            ValueError: one of the adapters cannot be mixed on this layer.
        """
        if mix is not None and any(self.has(name) for name in mix.adapters):
            raise ValueError(f"rows: expected adapters on linear layers, found one on {self.original_class.__name__}")

    def parameters_of(self, part: str) -> dict[str, list[nn.Parameter]]:
        """The parameters whose place is that of "lora_A" or "lora_B", by adapter."""
        found: dict[str, list[nn.Parameter]] = {}
        for attribute in self.PARTS.values():
            if attribute == part or attribute.startswith(f"{part}_"):
                for name, parameter in getattr(self, attribute).items():
                    found.setdefault(name, []).append(parameter)
        return found

    def delete_adapter(self, name: str) -> None:
        for by_name in self._by_adapter():
            if name in by_name:
                del by_name[name]
        self.active_adapters = tuple(active for active in self.active_adapters if active != name)

    def rename_adapter(self, old: str, new: str) -> None:
        for by_name in self._by_adapter():
            if old in by_name:
                by_name[new] = by_name.pop(old)
        self.active_adapters = tuple(new if active == old else active for active in self.active_adapters)

    def _by_adapter(self) -> list[Any]:
        """Everything that is kept by adapter name."""
        return [self.scaling, self.lora_dropout, *(getattr(self, attribute) for attribute in self.PARTS.values())]

    def release(self, merge: bool = False) -> None:
        """Turns the module back into what it was, with the active adapters folded in if `merge`."""
        if merge:
            self.check_merge()
            self.merge()
        else:
            self.unmerge()
        self._become_original()

    def _become_original(self) -> None:
        """Drops everything that `adopt` added."""
        original: Any = self.original_class
        for attribute in self.PARTS.values():
            delattr(self, attribute)
        for name in _LAYER_STATE:
            del self.__dict__[name]
        self.__class__ = original
        rebind_hooked_forward(self)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), self.ranks()]))

    def ranks(self) -> str:
        """The adapters and their ranks, in words."""
        return f"adapters=({', '.join(f'{name}: r={a.shape[0]}' for name, a in self.lora_A.items())})"


_LAYER_STATE = (
    "scaling", "lora_dropout", "active_adapters", "adapters_enabled", "merged_adapters", "original_class",
    "dense_dtype", "_before_merge",
)  # fmt: skip


def become(module: Any, kind: type[LoraLayer], dense_dtype: torch.dtype) -> Any:
    """Turns a module into a LoRA layer of a kind, without adapters, in place."""
    state: dict[str, Any] = dict(
        scaling={}, lora_dropout={}, active_adapters=(), adapters_enabled=True, merged_adapters=(),
        original_class=type(module), dense_dtype=dense_dtype, _before_merge={},
    )  # fmt: skip
    module.__class__ = kind.class_for(type(module))
    module.__dict__.update(state)
    for attribute in kind.PARTS.values():
        setattr(module, attribute, nn.ParameterDict())
    module.setup()
    rebind_hooked_forward(module)
    return module


_classes: dict[tuple[type, type], type] = {}


def class_of(kind: type[LoraLayer], original: type[nn.Module]) -> type[LoraLayer]:
    """The kind itself where it derives from the original class, else the one class that is both."""
    if issubclass(kind, original):
        return kind
    if (kind, original) not in _classes:
        _classes[kind, original] = type(f"Lora{original.__name__}", (kind, original), {"__module__": kind.__module__})
    return _classes[kind, original]


def rebind_hooked_forward(module: Any) -> None:
    """accelerate's device hooks keep the forward they wrap on the instance: make that the class's present one."""
    if "_old_forward" in module.__dict__:
        module._old_forward = types.MethodType(type(module).forward, module)
