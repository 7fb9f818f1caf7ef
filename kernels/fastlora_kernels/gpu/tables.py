"""Tables of plans as JSON files in `tuned/`: what was measured where, and which plan to take near a size.

A table that `bench/tune.py --results FOLDER` has made is used besides where FASTLORA_TABLES=FOLDER is set.

A file is one object:

    schema     1
    gpu        the name that the driver gives, or null for a table made by rule
    arch       compute capability as one number, 90 for sm_90
    measured   false for a table made by rule, whose rows then have no microseconds
    versions   {"torch": ..., "triton": ..., "cuda": ...}
    date       ISO date of the measurement, or null
    rows       a list of `Row`s, as objects
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .tiles import SIDE_OPS, Tile

SCHEMA = 1
FOLDER = Path(__file__).parent / "tuned"
LINEAR_OPS = ("forward", "backward", "int8")
OPS = (*LINEAR_OPS, *SIDE_OPS)
KINDS = ("decode", "fused", "two_pass", "scratch", "cublas", "int8", *SIDE_OPS)


@dataclass(frozen=True)
class Row:
    """The plan for one size.

    Args:
        op: "forward", "backward" for the gradient of x, "int8" for the forward with codes of x, or a kernel of
            `SIDE_OPS`: then `kind` is the same, N and K are the features of what it reads, and `tile.splits` programs
            per multiprocessor.
        dtype: of the activations: "bfloat16", "float16" or "float32". bfloat16 rows serve float16 where it has none.
        int8: whether the frozen weight is int8.
        dropout: True with, False without, None for either.
        max_rank: the longest rank that the row serves; 0 for the frozen layer alone.
        M, N, K: the size it was measured at, or made for.
        kind: one of `KINDS`.
        tile: of the kernel that multiplies with the weight, or of the one that `op` names.
        microseconds: median time of the whole op, or None where it was not measured.
    """

    op: str
    dtype: str
    int8: bool
    dropout: bool | None
    max_rank: int
    M: int
    N: int
    K: int
    kind: str
    tile: Tile
    microseconds: float | None = None


@dataclass(frozen=True)
class Table:
    """One file of `tuned/`."""

    gpu: str | None
    arch: int
    measured: bool
    versions: dict[str, str]
    date: str | None
    rows: tuple[Row, ...]

    def source(self) -> str:
        """Where the rows come from, in words."""
        return f"measured on {self.gpu}, {self.date}" if self.measured else f"rule for sm_{self.arch}, not measured"


def nearest(
    rows: Sequence[Row], op: str, dtype: str, M: int, N: int, K: int, R: int, int8: bool, dropout: bool
) -> Row | None:
    """The row that serves an operator's kind of operands and lies nearest to its size on a logarithmic scale."""
    for name in (dtype, "bfloat16") if dtype == "float16" else (dtype,):
        serving = [
            row for row in rows
            if (row.op, row.dtype, row.int8) == (op, name, int8) and row.dropout in (None, dropout)
            and (row.max_rank >= R if R else row.max_rank == 0) and (row.kind != "decode" or row.tile.block_m >= M)
        ]  # fmt: skip
        if serving:
            return min(serving, key=lambda row: _distance(row, M, N, K, R))
    return None


def _distance(row: Row, M: int, N: int, K: int, R: int) -> float:
    pairs = (row.M, M), (row.N, N), (row.K, K), (row.max_rank, R)
    return sum(abs(math.log2(max(one, 1) / max(other, 1))) for one, other in pairs)


def parse(content: Any, name: str) -> Table:
    """A table from parsed JSON.

    Raises:
        ValueError: a field is absent, unknown or of another kind than expected; names the file and the row.
    """
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{name}: expected a plan table of schema {SCHEMA}, found {found}")
    try:
        rows = tuple(_row(row, f"{name}: row {index}") for index, row in enumerate(content["rows"]))
        return Table(
            content["gpu"], int(content["arch"]), bool(content["measured"]), dict(content["versions"]),
            content["date"], rows,
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: expected a plan table, found {error!r}") from error


def _row(row: dict[str, Any], where: str) -> Row:
    unknown = set(row) - {field.name for field in fields(Row)}
    if unknown:
        raise ValueError(f"{where}: expected the fields of Row, found also {sorted(unknown)}")
    for field, allowed in (("op", OPS), ("kind", KINDS)):
        if row.get(field) not in allowed:
            raise ValueError(f"{where}: {field}: expected one of {allowed}, found {row.get(field)!r}")
    return Row(**{**row, "tile": Tile(**row["tile"])})


def dump(table: Table) -> dict[str, Any]:
    """What `parse` reads."""
    return {"schema": SCHEMA, **asdict(table), "rows": [asdict(row) for row in table.rows]}


def write(table: Table, path: Path) -> None:
    """Writes a table as a whole or not at all, a line per row."""
    content = dump(table)
    lines = ",\n  ".join(json.dumps(row) for row in content.pop("rows"))
    head = json.dumps(content)[:-1]
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(f'{head}, "rows": [\n  {lines}\n]}}\n')
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@functools.cache
def shipped() -> tuple[Table, ...]:
    """Every table of `tuned/` and of the folder that the environment variable FASTLORA_TABLES names, measured first."""
    own = os.environ.get("FASTLORA_TABLES")
    files = [*(sorted(Path(own).glob("tuned-*.json")) if own else []), *sorted(FOLDER.glob("*.json"))]
    tables = [parse(json.loads(path.read_text()), path.name) for path in files]
    return tuple(sorted(tables, key=lambda table: not table.measured))


def tables_for(arch: int | None, gpu: str | None = None) -> list[Table]:
    """The tables that serve a GPU: its own, then others of its architecture."""
    tables = [table for table in shipped() if table.arch == arch]
    return sorted(tables, key=lambda table: gpu is None or table.gpu != gpu)


def row_for(
    arch: int | None, gpu: str | None, op: str, dtype: torch.dtype, M: int, N: int, K: int, R: int, int8: bool, p: float
) -> tuple[Row, Table] | None:
    """The nearest row of the first table that has one for an operator's kind of operands, and that table."""
    for table in tables_for(arch, gpu):
        if row := nearest(table.rows, op, str(dtype).removeprefix("torch."), M, N, K, R, int8, p > 0):
            return row, table
    return None
