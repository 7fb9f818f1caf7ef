"""Layers whose adapters can be folded into their parameters, and taken out of them again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .fold import Fold
from .pages import release_pages

Parameters = dict[str, nn.Parameter | None]


class Foldable(nn.Module):
    """The part of a LoRA layer that merges.

    Attributes:
        merged_adapters: the adapters folded into the parameters.
        _before_merge: the parameters from before, by name; None where a merge did not keep them.
    """

    active_adapters: tuple[str, ...]
    adapters_enabled: bool
    merged_adapters: tuple[str, ...]
    _before_merge: Parameters | None

    def has(self, adapter: str) -> bool:
        """Whether the layer has an adapter of this name."""
        raise NotImplementedError

    @property
    def weight_device(self) -> torch.device:
        raise NotImplementedError

    def folds(self, adapters: tuple[str, ...]) -> list[Fold]:
        """What folding adapters adds to each of the layer's weights."""
        raise NotImplementedError

    def folded_besides(self, adapters: tuple[str, ...]) -> Parameters:
        """Small parameters with adapters folded in, such as biases."""
        return {}

    def check_fold(self, adapters: tuple[str, ...]) -> None:
        """Raises ValueError where adapters cannot be folded into the layer's parameters."""

    def home(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a parameter that a fold names, and the parameter's name there."""
        path, _, own = name.rpartition(".")
        return self.get_submodule(path), own

    def _parameter(self, name: str) -> Any:
        module, own = self.home(name)
        return module._parameters[own]

    def adapters_to_merge(self) -> tuple[str, ...]:
        """The adapters that `merge` would fold."""
        return () if self.merged_adapters else tuple(name for name in self.active_adapters if self.has(name))

    @torch.no_grad()
    def check_merge(self) -> None:
        """Raises ValueError where the active adapters cannot be folded, or a merged value would not be finite."""
        adapters = self.adapters_to_merge()
        if not adapters:
            return
        self.check_enabled("merge")
        self.check_fold(adapters)
        self.check_finite(adapters)

    def check_finite(self, adapters: tuple[str, ...]) -> None:
        """Raises ValueError where a merged value would be inf or nan."""
        folds = self.folds(adapters)
        finite = {fold.name: True for fold in folds}
        for fold in folds:
            finite[fold.name] &= fold.is_finite(*self._operands(fold))
        for name, parameter in self.folded_besides(adapters).items():
            finite[name] = parameter is None or bool(torch.isfinite(parameter).all())
        for name, is_finite in finite.items():
            if not is_finite:
                raise ValueError(f"adapters {list(adapters)}: expected a finite merged {name}, found inf or nan")

    def _operands(self, fold: Fold) -> tuple[Tensor, Tensor | None]:
        """W `[N, K]` and its scale."""
        w_scale = None if fold.scale_name is None else self._parameter(fold.scale_name).detach()
        return fold.view(self._parameter(fold.name).detach()), w_scale

    @torch.no_grad()
    def merge(self, keep_base: bool = True, untouchable: Collection[int] = ()) -> None:
        """Folds the active adapters into the parameters, whose values nobody has checked yet but `check_merge`.

        Args:
            keep_base: keep the parameters from before, so that `unmerge` is exact. Without, the weights are written
                over, and what fails in between leaves the layer without either.
            untouchable: addresses of memory that others use too, where a weight is replaced instead.
        """
        adapters = self.adapters_to_merge()
        if not adapters:
            return
        before = self.exchange(self.folded(adapters, None if keep_base else untouchable))
        self._before_merge, self.merged_adapters = before if keep_base else None, adapters

    def folded(self, adapters: tuple[str, ...], untouchable: Collection[int] | None = None) -> Parameters:
        """The layer's own parameters with adapters folded in, by name.

        Args:
            untouchable: None to compute new ones, else addresses of memory that must not be written over.
        """
        result: Parameters = {}
        for fold in self.folds(adapters):
            (w, w_scale), old = self._operands(fold), self._parameter(fold.name)
            if fold.name not in result:
                result[fold.name] = _target(old, fold, untouchable)
            scale = None if w_scale is None else torch.empty(len(w), device=w.device)
            fold.write(w, w_scale, fold.view(result[fold.name].data), scale)  # type: ignore[union-attr]
            if fold.scale_name is not None:
                result[fold.scale_name] = nn.Parameter(scale, requires_grad=False)  # type: ignore[arg-type]
        for name, parameter in result.items():
            if parameter is not self._parameter(name):
                release_pages(self._parameter(name).data)
        return result | self.folded_besides(adapters)

    @torch.no_grad()
    def weight_bytes(self) -> int:
        """Bytes of the weights that the active adapters are folded into, their scales included."""
        folds = self.folds(self.adapters_to_merge())
        names = {name for fold in folds for name in (fold.name, fold.scale_name) if name is not None}
        return sum(self._parameter(name).nbytes for name in names)

    @property
    def keeps_base(self) -> bool:
        return self._before_merge is not None

    def drop_base(self) -> None:
        """Forgets the parameters from before a merge; there is no `unmerge` then."""
        if self.merged_adapters:
            self._before_merge = None

    def check_base_kept(self, what: str) -> None:
        """Raises ValueError where the weights from before a merge are gone."""
        if not self.keeps_base:
            raise ValueError(
                f"{what}: expected a merge that kept the weights from before, found merge(keep_base=False); "
                "load the model and its adapter again"
            )

    def before_merge(self, name: str) -> Any:
        """A parameter as it was before any merge."""
        self.check_base_kept("model")
        return self._before_merge.get(name, self._parameter(name))  # type: ignore[union-attr]

    def disable(self) -> None:
        """Switches the adapters off, merged ones too."""
        self._exchange_base("disabled")
        self.adapters_enabled = False

    def enable(self) -> None:
        """Undoes `disable`."""
        self._exchange_base("disabled")
        self.adapters_enabled = True

    def _exchange_base(self, what: str) -> None:
        self.check_base_kept(what)
        self._before_merge = self.exchange(self._before_merge)  # type: ignore[arg-type]

    def unmerge(self) -> None:
        """Gives back the weights from before `merge`, bit for bit.

        Raises:
            ValueError: the adapters are disabled, or those weights were not kept.
        """
        self.check_unmerge()
        if self.merged_adapters:
            self._exchange_base("unmerge")
            self._before_merge, self.merged_adapters = {}, ()

    def check_unmerge(self) -> None:
        """Raises ValueError where `unmerge` would."""
        if self.merged_adapters:
            self.check_enabled("unmerge")
        self.check_base_kept("unmerge")

    def check_enabled(self, what: str) -> None:
        """Raises ValueError while the adapters are switched off, and what is merged is not in its place."""
        if not self.adapters_enabled:
            raise ValueError(f"{what}: expected enabled adapters, found a call inside fastlora.disabled(model)")

    def exchange(self, parameters: Parameters) -> Parameters:
        """Puts parameters in the place of those of the same names, on their devices, and returns these."""
        before: Parameters = {}
        for name, parameter in parameters.items():
            module, own = self.home(name)
            if parameter is not None:
                parameter.data = parameter.data.to(self.weight_device)
            before[name], module._parameters[own] = module._parameters[own], parameter
        return before


def _target(old: nn.Parameter, fold: Fold, untouchable: Collection[int] | None) -> nn.Parameter:
    """The parameter itself where it may be written over, else a new one."""
    if untouchable is not None and storage_address(old) not in untouchable and _is_viewed(fold, old):
        return old
    new = torch.empty_like(old)
    if not _is_viewed(fold, new):
        new = torch.empty_like(old, memory_format=torch.contiguous_format)
    return nn.Parameter(new, requires_grad=False)


def _is_viewed(fold: Fold, tensor: Tensor) -> bool:
    """Whether the fold's view is one of the tensor's memory; that of a kernel in channels-last order is a copy."""
    plain = tensor.detach()
    viewed = fold.view(plain)
    return viewed is plain or storage_address(viewed) == storage_address(tensor)


def storage_address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
