"""What a GPU could do at most, as measured in the same run, and what share of it a row reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
COPY = "copy of as many bytes"


@dataclass(frozen=True)
class Ceilings:
    """The fastest product in 16 bits and the fastest copy, in 1e12 operations and bytes per second."""

    tflops: float
    terabytes: float


def tflops(row: Row) -> float:
    return row["work"]["flop"] / row["median"] / 1e6


def terabytes(row: Row) -> float:
    return row["work"]["bytes"] / row["median"] / 1e6


def ceilings(rows: list[Row]) -> Ceilings | None:
    """None where the rows have no product by cuBLAS or no copy."""
    timed = [row for row in rows if is_timed(row)]
    copies = [terabytes(row) for row in timed if row["contender"] == COPY]
    products = [tflops(row) for row in timed if "cuBLAS" in row["contender"] and "int8 x int8" not in row["contender"]]
    return Ceilings(max(products), max(copies)) if copies and products else None


def is_timed(row: Row) -> bool:
    """Whether a row is a time of something whose operations and bytes are known."""
    return bool(row["median"] and row.get("work") and row["unit"] == "us")


def share(row: Row, most: Ceilings) -> float:
    """The time that the work would take at the ceilings, over the time that it took."""
    least = max(row["work"]["flop"] / most.tflops, row["work"]["bytes"] / most.terabytes) / 1e6
    return least / row["median"]
