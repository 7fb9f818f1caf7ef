"""Which implementation computes for a tensor: Triton on CUDA, native on CPU, the reference elsewhere."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

ROOMS = ("reference", "cpu", "gpu")
GPU_MAX_RANK = 256
KERNEL_DTYPES = {torch.float32, torch.float16, torch.bfloat16}

logger = logging.getLogger("fastlora")
_forced: str | None = None


def implementation(tensor: Tensor, rank: int = 0) -> ModuleType:
    """The room of `fastlora_kernels` that computes for `tensor` at a rank."""
    if _forced is not None:
        return _room(_forced)
    device = tensor.device.type
    if device not in ("cpu", "cuda"):
        return _fallback(f"there are no kernels for device {device!r}")
    if tensor.dtype.is_floating_point and tensor.dtype not in KERNEL_DTYPES:
        return _fallback(f"there are no kernels for {tensor.dtype}")
    if device == "cpu":
        return _room("cpu")
    if rank > GPU_MAX_RANK:
        return _fallback(f"the GPU kernels hold ranks up to {GPU_MAX_RANK}")
    return _gpu_room()


@contextmanager
def using(room: str) -> Iterator[None]:
    """Computes everything in one room of `fastlora_kernels` ("reference", "cpu" or "gpu"), for tests."""
    global _forced
    if room not in ROOMS:
        raise ValueError(f"room: expected one of {ROOMS}, found {room!r}")
    previous, _forced = _forced, room
    try:
        yield
    finally:
        _forced = previous


@functools.cache
def _room(name: str) -> ModuleType:
    return importlib.import_module(f"fastlora_kernels.{name}")


@functools.cache
def _gpu_room() -> ModuleType:
    try:
        return _room("gpu")
    except ModuleNotFoundError as error:
        return _fallback(str(error))


@functools.cache
def _fallback(reason: str) -> ModuleType:
    """The reference; cached, so that each reason is logged once."""
    logger.warning("fastlora computes with eager PyTorch: %s", reason)
    return _room("reference")
