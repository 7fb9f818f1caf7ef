"""How much memory is alive while a program runs, counted tensor by tensor as torch makes and drops them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make inside a `with` block, each once, for as long as they live.

    What an operator allocates and drops within itself is not seen; tensors without data count as if they had some.

    Attributes:
        now: bytes alive.
        peak: the most that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def ignore(self, *tensors: Tensor) -> None:
        """Leaves out what was there before."""
        for tensor in tensors:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._watch(storage, storage.nbytes())
        return result

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._alive:
            return

        def drop(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, drop)
        self.now += size
        self.peak = max(self.peak, self.now)
