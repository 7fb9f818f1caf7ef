"""Compiles every kernel variant that the launchers can launch, for every supported architecture, without a GPU.

    python bench/compile_kernels.py [--arch 90] [--dtype bfloat16] [--all] [--json FILE]

Exits with 1 where a variant does not compile, spills registers or exceeds the shared memory of its architecture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

from fastlora_kernels.gpu import aot

DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Row:
    """One variant on one architecture; `error` is empty where it compiled."""

    arch: int
    dtype: str
    kernel: str
    variant: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    matrix: str = ""
    loads: str = ""
    error: str = ""

    def problem(self) -> str:
        """Why this variant must not be launched; empty where it may."""
        if self.error:
            return self.error
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > aot.SHARED_LIMIT[self.arch]:
            return f"takes {self.shared} bytes of shared memory, {aot.SHARED_LIMIT[self.arch]} are there"
        return self._unplanned() if self.arch == 90 and self.kernel in aot.WEIGHT_KERNELS else ""

    def _unplanned(self) -> str:
        """Where the compiler did not do on Hopper what the kernel that multiplies with the weight is written for."""
        words = self.variant.split()
        if self.kernel == "int8_linear" and self.matrix != "wgmma, int8":
            return f"int8 tensor cores are not used: {self.matrix}"
        if self.kernel != "int8_linear" and "int8" in words and self.matrix != "wgmma, left in registers":
            return f"int8 weights go through shared memory: {self.matrix}"
        if "tma" in words and self.loads != "TMA":
            return f"planned with TMA, loads with {self.loads}"
        return ""


def compile_all(arch: int, dtype: str) -> list[Row]:
    """Every variant for one architecture and dtype."""
    rows = []
    for name, launch in aot.launches(arch, getattr(torch, dtype)):
        kernel, _, variant = name.partition(" ")
        try:
            rows.append(Row(arch, dtype, kernel, variant, **asdict(aot.compile_for(launch, arch))))
        except Exception as error:  # whatever the compiler raises is the result for this row
            rows.append(Row(arch, dtype, kernel, variant, error=f"{type(error).__name__}: {str(error)[:300]}"))
    return rows


def summary(rows: list[Row]) -> Table:
    """One line per kernel, weight kind, architecture and dtype."""
    table = Table(title=f"triton {triton.__version__}, torch {torch.__version__}", title_justify="left")
    for column in ("arch", "dtype", "kernel", "variants", "registers", "spilled", "shared", "matrix", "loads"):
        table.add_column(
            column, justify="right" if column in ("variants", "registers", "spilled", "shared") else "left"
        )
    families: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        weight = next((kind for kind in ("int8", "dense") if kind in row.variant.split()), "")
        families.setdefault((row.arch, row.dtype, f"{row.kernel} {weight}".strip()), []).append(row)
    for (arch, dtype, kernel), family in families.items():
        registers = [row.registers for row in family]
        matrix = ", ".join(sorted({row.matrix for row in family}))
        loads = ", ".join(sorted({row.loads for row in family}))
        spilled, shared = max(row.spilled for row in family), max(row.shared for row in family)
        span = f"{min(registers)}-{max(registers)}"
        table.add_row(f"sm_{arch}", dtype, kernel, str(len(family)), span, str(spilled), str(shared), matrix, loads)
    return table


def every_row(rows: list[Row]) -> Table:
    table = Table()
    for column in Row.__dataclass_fields__:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in asdict(row).values()))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=sorted(aot.SHARED_LIMIT))
    parser.add_argument("--dtype", nargs="*", default=DTYPES)
    parser.add_argument("--all", action="store_true", help="print a line per variant")
    parser.add_argument("--json", type=Path, help="write every row here")
    options = parser.parse_args()
    jobs = list(product(options.arch, options.dtype))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=context) as pool:
        rows = [row for result in pool.map(compile_all, *zip(*jobs, strict=True)) for row in result]
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(every_row(rows) if options.all else summary(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        options.json.write_text(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=1))
    problems = [row for row in rows if row.problem()]
    for row in problems:
        console.print(f"[red]sm_{row.arch} {row.dtype} {row.kernel} {row.variant}[/]: {row.problem()}", markup=True)
    print(f"{len(rows) - len(problems)} of {len(rows)} variants compile without spills within shared memory")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
