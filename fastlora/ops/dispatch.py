"""Which implementation computes for a tensor: Triton on CUDA, native on CPU, the reference elsewhere."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

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


def run(name: str, tensor: Tensor, rank: int, *inputs: Any) -> Any:
    """Calls a function of the room that computes for `tensor` at a rank.

    Autocast is off meanwhile: a room chooses the dtype of each product itself.
    """
    function, device = getattr(implementation(tensor, rank), name), tensor.device.type
    if not torch.is_autocast_enabled(device):
        return function(*inputs)
    with torch.autocast(device, enabled=False):
        return function(*inputs)


@functools.cache
def _choose(forced: str | None, device: str, dtype: torch.dtype, rank: int) -> ModuleType:
    if forced is not None:
        return _room(forced)
    reason = why_eager(device, dtype, rank)
    if reason is not None:
        return _fallback(reason)
    return _room("cpu" if device == "cpu" else "gpu")


def why_eager(device: str, dtype: torch.dtype, rank: int = 0) -> str | None:
    """Why eager PyTorch computes for inputs of a dtype on a kind of device; None where there are kernels."""
    if device not in ("cpu", "cuda"):
        return f"there are no kernels for device {device!r}"
    if dtype.is_floating_point and dtype not in KERNEL_DTYPES:
        return f"there are no kernels for {dtype}"
    if device == "cpu":
        return None
    if rank > GPU_MAX_RANK:
        return f"the GPU kernels hold ranks up to {GPU_MAX_RANK}"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def describe(device: torch.device, dtype: torch.dtype, rank: int = 0) -> str:
    """Which implementation computes for inputs of a dtype on a device, and why if eager PyTorch does, in words.

    The device need not be there.
    """
    reason = why_eager(device.type, dtype, rank)
    if _forced is not None:
        return f"fastlora_kernels.{_forced}, as `using` says"
    if reason is not None:
        return f"eager PyTorch: {reason}"
    if device.type == "cpu":
        return f"native CPU: {_room('cpu').describe(dtype)}"
    return f"Triton kernels on {torch.cuda.get_device_name(device)}" if torch.cuda.is_available() else "Triton kernels"


@dataclass(frozen=True)
class Place:
    """Where something is to run, there or not.

    Attributes:
        tokens: how many a call has, where that is known.
        arch: a GPU's compute capability as one number, 90 for sm_90; None for that of the GPU that is there.
    """

    device: torch.device
    tokens: int | None = None
    arch: int | None = None


def gpu_plans(place: Place, dtype: torch.dtype, N: int, K: int, rank: int, int8: bool, p: float) -> str | None:
    """How the GPU kernels compute a linear layer of a size in training, and where that choice comes from, in words.

    None where they do not compute it, or the number of tokens is not known.
    """
    if place.tokens is None or place.device.type != "cuda" or why_eager("cuda", dtype, rank) or _forced is not None:
        return None
    arch, name = place.arch, None
    if arch is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(place.device)
        arch, name = 10 * major + minor, torch.cuda.get_device_name(place.device)
    choose = importlib.import_module("fastlora_kernels.gpu.plan").choose_plan
    forward, backward = (
        choose(arch, dtype, place.tokens, N, K, rank, int8, p, op, name) for op in ("forward", "backward")
    )
    return f"{forward.kind} forward, {backward.kind} backward ({forward.why})"


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
def _fallback(reason: str) -> ModuleType:
    """The reference; cached, so that each reason is logged once."""
    logger.warning("fastlora computes with eager PyTorch: %s", reason)
    return _room("reference")
