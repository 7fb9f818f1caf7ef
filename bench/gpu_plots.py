"""Plots of a GPU's rows: a roofline, speed over tokens, and memory over tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from roofline import Row, ceilings, is_timed, tflops

SWEEP, MEMORY = "linear by tokens", "bytes for backward, GPU"
COLORS = ("tab:blue", "tab:cyan", "tab:orange", "tab:brown", "tab:gray", "tab:green", "tab:red")


def draw(rows: list[Row], file: Path) -> None:
    measured = [row for row in rows if row["median"] is not None]
    figure = Figure(figsize=(18, 6), layout="constrained")
    roofline, speed, memory = figure.subplots(1, 3)
    draw_roofline(roofline, [row for row in measured if is_timed(row)])
    draw_lines(speed, [row for row in measured if row["question"] == SWEEP], tflops)
    speed.set(xscale="log", yscale="log", xlabel="tokens", ylabel="TFLOP/s of the frozen product")
    speed.set_title("Speed of one linear over tokens", loc="left")
    draw_lines(memory, [row for row in measured if row["question"] == MEMORY], lambda row: row["median"])
    memory.set(xlabel="tokens", ylabel="MiB")
    memory.set_title("Held for the backward of one layer", loc="left")
    first = rows[-1]
    figure.suptitle(f"{first['machine']['gpu']}, {first['date']}, commit {first['commit']}", fontsize=9)
    figure.savefig(file, dpi=110)


def draw_roofline(axis: Axes, rows: list[Row]) -> None:
    """Each row's speed over its operations per byte, under the ceilings that were measured in the same run."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["contender"].split(",")[0], []).append(row)
    for color, (name, group) in zip(COLORS * len(groups), groups.items(), strict=False):
        intensity = [row["work"]["flop"] / row["work"]["bytes"] for row in group]
        axis.scatter(intensity, [tflops(row) for row in group], s=18, color=color, label=name)
    if most := ceilings(rows):
        bandwidth, peak = most.terabytes, most.tflops
        axis.plot([1, peak / bandwidth, 1e4], [bandwidth, peak, peak], color="black", linewidth=1)
        axis.set_xlabel(f"operations per byte; ceilings: cuBLAS {peak:.0f} TFLOP/s, copy {bandwidth:.2f} TB/s")
    axis.set(xscale="log", yscale="log", ylabel="TFLOP/s of the frozen products")
    axis.set_title("Roofline", loc="left")
    if groups:
        axis.legend(fontsize=6)


def draw_lines(axis: Axes, rows: list[Row], value: Any) -> None:
    """One line per contender over the number of tokens."""
    contenders = dict.fromkeys(row["contender"] for row in rows)
    for color, name in zip(COLORS * len(contenders), contenders, strict=False):
        points = sorted((row["sizes"]["M"], value(row)) for row in rows if row["contender"] == name)
        axis.plot(*zip(*points, strict=True), marker="o", color=color, label=name)
    if contenders:
        axis.legend(fontsize=7)
