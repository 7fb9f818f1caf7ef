"""Bytes that a launch moves, counted from the launch: to and from memory, and what an L2 cache answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .launch import Launch


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch.

    Attributes:
        weight: reads and writes of W and the merged W, which are too large for a cache.
        small: the first read of each of the other operands, and the writes of those.
        repeated: reads of the other operands beyond the first, which an L2 cache answers.
    """

    weight: int
    small: int
    repeated: int

    @property
    def memory(self) -> int:
        """Bytes that cross the memory bus."""
        return self.weight + self.small


def merge_rows_traffic(launch: Launch) -> Traffic:
    """What a launch of `merge_rows_launch` moves.

    A program owns rows of W. It reads them once, or twice where W is int8, first for the largest value of the merged
    row and then for its codes: `3 N K` bytes with the write for int8, `2 N K` elements for a dense W. A is read whole
    by every program in every pass, B once per pass and tile of columns.
    """
    arguments = launch.arguments
    N, K = arguments["N"], arguments["K"]
    passes = 2 if arguments["QUANTIZED"] else 1
    element = arguments["w_ptr"].element_size()
    a, b, scale = (_bytes(arguments[name]) for name in ("a_ptr", "b_ptr", "scale_ptr"))
    programs = math.prod(launch.grid)
    tiles = -(-K // arguments["BLOCK_K"])
    scales = 2 * N * 4 if arguments["QUANTIZED"] else 0  # read once, written once
    repeated = (programs * passes - 1) * a + (passes * tiles - 1) * b + (programs - 1) * scale
    return Traffic((passes + 1) * N * K * element, a + b + scale + scales, repeated)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
