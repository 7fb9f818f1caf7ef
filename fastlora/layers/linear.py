"""Linear layers with LoRA adapters: `nn.Linear`, transformers' `Conv1D`, and the 8-bit layers of bitsandbytes."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastlora_kernels.reference import FEW_TOKENS

from .. import ops
from .base import LoraLayer
from .bitsandbytes import is_linear8bit
from .branch import draw_seed, dropout, low_rank
from .frozen_linear import FrozenLinear
from .group import Seat
from .mixed import Mix, add_rows

# Subclasses of nn.Linear whose forward differs from it in nothing but the way it is written.
EQUIVALENT_LINEARS = {"FalconLinear"}


class LinearLayer(FrozenLinear):
    """What a linear layer with adapters computes: one plain adapter in the fused op, anything else around it."""

    @classmethod
    def class_for(cls, original: type[nn.Module]) -> type[LoraLayer]:
        return cls

    mix: Mix | None = None
    threshold: float | None = None  # of the outliers of x, where products are of int8 codes with int8 codes
    together: tuple[Any, Tensor, Tensor] | None = None  # adapters of the mix, and what tells whether they changed
    seat: Seat | None = None  # in a group of layers that read the same tensor

    def mix_adapters(self, mix: Mix | None) -> None:
        self.__dict__.pop("together", None)
        if mix is None:
            self.__dict__.pop("mix", None)
            return
        here = tuple(name for name in mix.adapters if self.has(name))
        for name in here:
            if name in self.lora_magnitude:
                raise ValueError(f"rows: expected adapters without DoRA, found {name!r}")
        self.mix = mix.among(here, self.weight.device)

    def multiplies_codes(self) -> bool:
        """Whether ops of ours multiply with int8 codes here, so that a `threshold` means something."""
        return self._parameters["weight_scale"] is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.seat is not None and (together := self.seat.output(self, x)) is not None:
            return together
        parameters: dict[str, Any] = self._parameters  # nn.Module's attribute lookup costs as much as a small kernel
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != parameters["weight"].dtype and parameters["weight_scale"] is None:
            raise TypeError(f"input: expected {self.weight.dtype}, the dtype of the weight, found {x.dtype}")
        bias = parameters["bias"]
        if bias is None or not bias.requires_grad:
            return self._linear(x, bias)
        return self._linear(x, None) + bias.to(x.dtype)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        adapter = self.fused_adapter()
        if adapter is not None:
            w, w_scale, a, b, scale, p = self.operands(adapter)
            seed = draw_seed(x) if p > 0 else None
            return ops.lora_linear(x, w, w_scale, bias, a, b, scale, p, seed, self.threshold)
        if self.mix is not None and self.adapters_enabled:
            return self._mixed(x, bias, self.mix)
        running = self.running_adapters()
        return self._several(x, bias, running) if running else self._frozen(x, bias)

    def fused_adapter(self) -> str | None:
        """The adapter that one op computes together with the frozen layer, where that is all there is to do."""
        running = self.running_adapters()
        if len(running) != 1 or self.mix is not None:
            return None
        modules: dict[str, Any] = self._modules
        special = modules["lora_magnitude"]._parameters, modules["lora_B_bias"]._parameters
        return None if running[0] in special[0] or running[0] in special[1] else running[0]

    def operands(self, adapter: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float, float]:
        """w, w_scale, a, b, scale and p of the op, for an adapter."""
        modules: dict[str, Any] = self._modules
        a, b = modules["lora_A"]._parameters[adapter], modules["lora_B"]._parameters[adapter]
        p = self.lora_dropout[adapter] if self.training else 0.0
        return self.frozen_weight, self._parameters["weight_scale"], a, b, self.scaling[adapter], p

    def _frozen(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight, weight_scale = self.frozen_weight, self._parameters["weight_scale"]
        if weight_scale is None:
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return ops.lora_linear(x, weight, weight_scale, bias, threshold=self.threshold)

    def _several(self, x: Tensor, bias: Tensor | None, adapters: tuple[str, ...]) -> Tensor:
        if self._why_apart(adapters, self.training) is not None:
            y = self._frozen(x, bias)
            for adapter in adapters:
                y = y + self._added(x, adapter)
            return y
        if adapters[0] in self.lora_magnitude:
            return self._dora(x, bias, adapters[0])
        a, b = self._stacked(adapters)
        y = ops.lora_linear(x, self.frozen_weight, self.weight_scale, bias, a, b, threshold=self.threshold)
        return y + self._bias_of(adapters).to(y.dtype) if self._has_bias(adapters) else y

    def _why_apart(self, adapters: tuple[str, ...], training: bool) -> str | None:
        """Why the low-rank parts of adapters are computed beside the frozen product; None where one op has both."""
        drops = training and any(self.lora_dropout[adapter] for adapter in adapters)
        scaled = any(adapter in self.lora_magnitude for adapter in adapters)
        if len(adapters) > 1 and (drops or scaled):
            return f"several adapters with {'dropout' if drops else 'DoRA'}"
        if drops and (scaled or self._has_bias(adapters)):
            return f"{'DoRA' if scaled else 'a bias of B'} with dropout"
        return None

    def computed_by(self, place: ops.Place | None = None) -> str:
        running = self.running_adapters()
        rank = sum(self.lora_A[adapter].shape[0] for adapter in running)
        place, dtype = place or ops.Place(self.weight_device), self.dense_dtype
        words = ops.describe(place.device, dtype, rank)
        p = max((self.lora_dropout[adapter] for adapter in running), default=0.0)
        plans = ops.gpu_plans(place, dtype, *self.features(self), rank, self.weight_scale is not None, p)
        words = words if plans is None else f"{words}: {plans}"
        if self.threshold is not None:
            words += f", inputs of more than {FEW_TOKENS} tokens in int8"
        reason = self._why_apart(running, training=True)
        return words if reason is None else f"frozen product by {words}; adapters by PyTorch: {reason}"

    def _dora(self, x: Tensor, bias: Tensor | None, adapter: str) -> Tensor:
        """One DoRA adapter without dropout: the plain layer's output, scaled per feature."""
        weight, weight_scale, factor = self.frozen_weight, self.weight_scale, self._row_factor(adapter)
        a, b, scaling = self.lora_A[adapter], self.lora_B[adapter], self.scaling[adapter]
        if weight_scale is not None and not torch.is_grad_enabled():
            # The scale of the int8 rows takes the factor in; nothing more is to be computed.
            b = b * factor[:, None]
            return ops.lora_linear(x, weight, weight_scale * factor, bias, a, b, scaling, threshold=self.threshold)
        y = ops.lora_linear(x, weight, weight_scale, None, a, b, scaling, threshold=self.threshold)
        y = y * factor.to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _mixed(self, x: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
        """Each row of the batch with its own adapter."""
        if not mix.adapters:
            return self._frozen(x, bias)
        names = mix.adapters
        a, b = self._side_by_side(names)
        ranks, scales = [self.lora_A[name].shape[0] for name in names], [float(self.scaling[name]) for name in names]
        ps = [self.lora_dropout[name] if self.training else 0.0 for name in names]
        y = ops.lora_linear_mixed(
            x, self.frozen_weight, self.weight_scale, bias, a, b, ranks, scales, mix.rows, ps,
            draw_seed(x) if any(ps) else None,
        )  # fmt: skip
        if self._has_bias(mix.adapters):
            zero = y.new_zeros(y.shape[-1])
            biases = [self._bias_of((name,)) if name in self.lora_B_bias else zero for name in mix.adapters]
            y = add_rows(y, mix.rows, torch.stack([zero, *biases]))
        return y

    def _side_by_side(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """A and B of adapters as one matrix each; without gradients made once per mix, until one is written to."""
        all_a, all_b = [self.lora_A[name] for name in names], [self.lora_B[name] for name in names]
        together = [*all_a, *all_b]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in together):
            return torch.cat(all_a), torch.cat(all_b, dim=1)
        state = [(parameter.data_ptr(), parameter._version) for parameter in together]
        if self.together is None or self.together[0] != state:
            self.together = state, torch.cat(all_a), torch.cat(all_b, dim=1)
        return self.together[1:]

    def _added(self, x: Tensor, adapter: str) -> Tensor:
        """What one adapter adds to the frozen layer's output."""
        x = dropout(x, self.lora_dropout[adapter] if self.training else 0.0)
        added = self.scaling[adapter] * low_rank(x, self.lora_A[adapter], self.lora_B[adapter])
        if adapter in self.lora_magnitude:
            factor = self._row_factor(adapter).to(x.dtype)
            added = (factor - 1) * self._frozen(x) + factor * added
        return added + self._bias_of((adapter,)).to(added.dtype) if self._has_bias((adapter,)) else added

    def extra_repr(self) -> str:
        kind = str(self.weight.dtype).removeprefix("torch.")
        N, K = self.features(self)
        return f"in_features={K}, out_features={N}, weight={kind}, {self.ranks()}"


class LoraLinear(LinearLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with LoRA adapters."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        if is_linear8bit(module):
            return True
        # Nobody calls the output projection of nn.MultiheadAttention: an adapter there would do nothing.
        if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
            return False
        return type(module).forward is nn.Linear.forward or type(module).__name__ in EQUIVALENT_LINEARS

    @property
    def frozen_weight(self) -> Any:
        return self._parameters["weight"]


class LoraConv1D(LinearLayer):
    """transformers' `Conv1D`, a linear layer whose dense weight is stored as `[K, N]`, with LoRA adapters."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        # A model with a Conv1D has imported transformers; fastlora need not.
        transformers_layers = sys.modules.get("transformers.pytorch_utils")
        return transformers_layers is not None and isinstance(module, transformers_layers.Conv1D)

    @classmethod
    def features(cls, module: Any) -> tuple[int, int]:
        return module.nf, module.nx

    @property
    def frozen_weight(self) -> Tensor:
        return self.weight.T if self.weight_scale is None else self.weight

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.T

    def _matrix(self, stored: Tensor) -> Tensor:
        return stored if stored.dtype == torch.int8 else stored.T
