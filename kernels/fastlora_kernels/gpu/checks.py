"""What the kernels can take, said before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import MAX_RANK

LARGEST = 2**31 - 1024  # of an axis: what an int32 counts, and a tile more
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_rank(rank: int, limit: int = MAX_RANK) -> None:
    if not 1 <= rank <= limit:
        raise ValueError(f"rank: expected 1 to {limit}, found {rank}")


def check_operands(
    x: Tensor | None, w: Tensor, w_scale: Tensor | None, a: Tensor | None, b: Tensor | None, *,
    d_y: Tensor | None = None, s: Tensor | None = None, bias: Tensor | None = None, seed: Tensor | None = None,
) -> None:  # fmt: skip
    """Shapes that fit one another, one device, dtypes that kernels exist for, sizes that an int32 counts.

    Raises:
        ValueError: a shape, size, rank or device.
        TypeError: a dtype.
    """
    if (a is None) != (b is None):
        raise ValueError(f"b: expected {'no tensor without a' if a is None else 'a tensor beside a'}")
    if a is not None:
        check_rank(a.shape[0])
    (N, K), R = _matrix("w", w), 0 if a is None else a.shape[0]
    first = x if d_y is None else d_y
    M = 0 if first is None else _matrix("x" if d_y is None else "d_y", first)[0]
    shapes = {
        "x": (x, (M, K)), "d_y": (d_y, (M, N)), "a": (a, (R, K)), "b": (b, (N, R)), "s": (s, (M, R)),
        "w_scale": (w_scale, (N,)), "bias": (bias, (N,)),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
        if tensor is not None and tensor.device != w.device:
            raise ValueError(f"{name}: expected device {w.device}, that of w, found {tensor.device}")
    if seed is not None and (seed.numel() != 1 or seed.device != w.device):
        raise ValueError(f"seed: expected one number on {w.device}, found {list(seed.shape)} on {seed.device}")
    if max(M, N, K) > LARGEST:
        raise ValueError(f"x, w: expected axes up to {LARGEST}, found {M} tokens, {K} in and {N} out features")
    _check_dtypes(first, w, w_scale)


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected two axes, found shape {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def _check_dtypes(first: Tensor | None, w: Tensor, w_scale: Tensor | None) -> None:
    if first is not None and first.dtype not in DTYPES:
        raise TypeError(f"x: expected one of {DTYPES}, found {first.dtype}")
    expected = (torch.int8,) if w_scale is not None else DTYPES
    if w.dtype not in expected:
        with_scale = "with" if w_scale is not None else "without"
        raise TypeError(f"w: expected one of {expected} {with_scale} a w_scale, found {w.dtype}")
