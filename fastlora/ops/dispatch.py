"""Which implementation computes for a tensor: Triton on CUDA, native on CPU, the reference elsewhere."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from ..log import logger

ROOMS = ("reference", "cpu", "gpu")
GPU_MAX_RANK = 256
KERNEL_DTYPES = {torch.float32, torch.float16, torch.bfloat16}

_forced: str | None = None


def implementation(tensor: Tensor, rank: int = 0) -> ModuleType:
    """The room of `fastlora_kernels` that computes for `tensor` at a rank."""
    return _choose(_forced, tensor.device.type, tensor.dtype, rank)


@functools.cache
def _choose(forced: str | None, device: str, dtype: torch.dtype, rank: int) -> ModuleType:
    if forced is not None:
        return _room(forced)
    if device not in ("cpu", "cuda"):
        return _fallback(f"there are no kernels for device {device!r}")
    if dtype.is_floating_point and dtype not in KERNEL_DTYPES:
        return _fallback(f"there are no kernels for {dtype}")
    if device == "cpu":
        return _room("cpu")
    if rank > GPU_MAX_RANK:
        return _fallback(f"the GPU kernels hold ranks up to {GPU_MAX_RANK}")
    return _gpu_room()


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation computes for inputs of a dtype on a device, in words."""
    room = _choose(_forced, device.type, dtype, rank=0).__name__.rsplit(".")[-1]
    if room == "cpu":
        return f"native CPU: {_room('cpu').describe(dtype)}"
    return "eager PyTorch" if room == "reference" else f"Triton kernels on {torch.cuda.get_device_name(device)}"


def is_slow(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies matrices of a dtype in scalar loops on a device."""
    return device.type == "cpu" and _room("cpu").product_dtype(dtype) != dtype


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
