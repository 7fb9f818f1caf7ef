"""Prints the rows of a benchmark beside their targets, and draws them.

python bench/report.py [--quick] [--gpu] [--results FOLDER] [FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu import machine as gpu_machine
from gpu_plots import draw as draw_gpu
from harness import RESULTS, read_rows, results_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from roofline import Ceilings, Row, ceilings, is_timed, share, terabytes, tflops
from targets import GPU_TARGETS, Target, rows_of, target_of, verdict

FIRST_FIGURES = "first-figures.json"  # beside the rows of a GPU
COLORS = {"fastlora": "tab:blue", "PEFT": "tab:orange"}
STYLES = {"aim": "bold green", "reach": "green", "no": "red"}
# Panels of the plot, down the left column and then the right: the question, the contender whose figure is 1, the title.
PANELS = [
    ("training", "frozen base", "Training step / frozen base's step"),
    ("decode", "bf16 without LoRA", "Decode, one token / bf16 without LoRA"),
    ("peak of a step", "frozen base", "Peak memory of a step / frozen base's"),
    ("overhead", None, "Overhead of a layer's call, us"),
    ("bytes for backward", "floor", "Bytes held for backward / floor"),
    ("peak of quantising", "bf16 model + one layer", "Peak of quantising / bf16 model + one layer"),
]


def figures(row: Row) -> Iterator[tuple[str | None, float]]:
    """What of a row can be held to a target: its ratios, and its own figure where it has none or a target is for it."""
    yield from row["ratios"].items()
    if not row["ratios"] or target_of(row, None):
        yield None, row["median"]


def make_table(question: str, rows: list[Row], most: Ceilings | None = None) -> Table:
    """`others` is how many cores other processes kept busy meanwhile; "roofline" the share of what the GPU can do."""
    on_gpu = "gpu" in rows[-1]["machine"]
    table = Table(title=question, title_justify="left", title_style="bold")
    for column in ("case", "contender", "over"):
        table.add_column(column, no_wrap=True)
    extra = ("rate", "roofline") if on_gpu else ("others",)
    for column in ("median", "p20 to p80", "rounds", *extra, "ratio", "reach", "aim", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["case"], row["contender"]]
        if row["median"] is None:
            table.add_row(*cells, "", row["note"][:40])
            continue
        spread = "" if row["p20"] is None else f"{row['p20']:.4g} to {row['p80']:.4g}"
        others = "" if row["others"] is None else f"{row['others']:.2f}"
        measured = [f"{row['median']:.4g} {row['unit']}", spread, str(row["rounds"])]
        measured += [rate(row), roofline(row, most)] if on_gpu else [others]
        for over, value in figures(row):
            ratio = "" if over is None else f"{value:.3f}"
            table.add_row(*cells, over or "", *measured, ratio, *bounds(row, over, value))
            cells, measured = ["", ""], [""] * len(measured)
    return table


def rate(row: Row) -> str:
    """What a call does in a second of the least that it must."""
    return f"{tflops(row):.0f} TFLOP/s, {terabytes(row):.2f} TB/s" if is_timed(row) else ""


def roofline(row: Row, most: Ceilings | None) -> str:
    return f"{share(row, most):.0%}" if most and is_timed(row) else ""


def target_table(rows: list[Row]) -> Table:
    """Every target of a GPU, with what was measured for it or that nothing was."""
    most, table = ceilings(rows), Table(title="targets", title_justify="left", title_style="bold")
    for column in ("question", "case", "contender", "over", "measured", "reach", "aim", "met", "rate", "roofline"):
        table.add_column(column, no_wrap=True)
    for target in GPU_TARGETS:
        limits = [f"<= {target.reach:.4g}", "" if target.aim is None else f"<= {target.aim:.4g}"]
        found = rows_of(target, rows)
        if not found:
            case = target.case.strip("^")
            table.add_row(
                target.question, case, target.contender, target.over or "", "not measured", *limits, "", "", ""
            )
        for row in found:
            names = row["case"], row["contender"], target.over or ""
            value = figure_of(row, target)
            met = verdict(value, target)
            last = f"[{STYLES[met]}]{met}[/]", rate(row), roofline(row, most)
            table.add_row(target.question, *names, f"{value:.4g}", *limits, *last)
    return table


def figure_of(row: Row, target: Target) -> float:
    return row["median"] if target.over is None else row["ratios"][target.over]


def bounds(row: Row, over: str | None, value: float) -> list[str]:
    """The cells reach, aim and met of a figure."""
    target = target_of(row, over)
    if target is None:
        return ["", "", ""]
    met = verdict(value, target)
    aim = "" if target.aim is None else f"<= {target.aim:.4g}"
    return [f"<= {target.reach:.4g}", aim, f"[{STYLES[met]}]{met}[/]"]


def origin(rows: list[Row]) -> str:
    """Where the rows come from; a file may hold rows of several commits and days."""
    machine = rows[-1]["machine"]
    if "gpu" in machine:
        where = ", ".join(f"{name} {value}" for name, value in machine.items())
    else:
        loads = [row["machine"]["load"] for row in rows]
        where = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['capability']}, bf16 by {machine['bf16']}, "
            f"load average {min(loads)} to {max(loads)}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items())
    commits, dates = sorted({row["commit"] for row in rows}), sorted(row["date"] for row in rows)
    return f"{where}\n{versions}\ncommit {', '.join(commits)}; {dates[0]} to {dates[-1]}"


def draw(rows: list[Row], file: Path) -> None:
    figure = Figure(figsize=(16, 17), layout="constrained")
    axes = figure.subplots(3, 2, height_ratios=[4, 1, 1])
    for axis, (question, over, title) in zip(axes.T.flat, PANELS, strict=True):
        draw_panel(axis, [row for row in rows if row["question"] == question], over)
        axis.set_title(title, loc="left")
    figure.suptitle(f"{origin(rows)}\nblack: what must be reached", fontsize=9, ha="left", x=0.01)
    figure.savefig(file, dpi=110)


def draw_panel(axis: Axes, rows: list[Row], over: str | None) -> None:
    """A bar per row from the top down, with a mark at what must be reached."""
    rows = [row for row in rows if over is None or over in row["ratios"]]
    axis.set_visible(bool(rows))
    for place, row in enumerate(rows):
        value = row["median"] if over is None else row["ratios"][over]
        color = next((c for name, c in COLORS.items() if row["contender"].startswith(name)), "tab:gray")
        axis.barh(place, value, color=color)
        axis.text(0, place, f" {value:.2f}", va="center", fontsize=7)
        target = target_of(row, over)
        if target is not None:
            axis.plot([target.reach] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
    axis.set_yticks(range(len(rows)), [f"{row['case']}: {row['contender']}" for row in rows], fontsize=7)
    axis.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="the rows of a quick run")
    parser.add_argument("--gpu", action="store_true", help="the rows of a GPU, and every target of one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    arguments = parser.parse_args()
    console = Console(width=240 if arguments.gpu else 200)
    file = arguments.file or file_of(arguments.gpu, arguments.quick, arguments.results)
    rows = [] if file is None else read_rows(file.with_name(FIRST_FIGURES)) * arguments.gpu + read_rows(file)
    if arguments.gpu:
        console.print(target_table(rows))
    elif not rows:
        raise SystemExit(f"no rows in {file}: run `make bench` first")
    if file is None or not rows:
        console.print("not measured: there are no rows of a GPU")
        return
    most = ceilings(rows)
    for question in dict.fromkeys(row["question"] for row in rows):
        console.print(make_table(question, [row for row in rows if row["question"] == question], most))
    console.print(origin(rows))
    (draw_gpu if "gpu" in rows[-1]["machine"] else draw)(rows, file.with_suffix(".png"))
    console.print(f"rows in {file}, plot in {file.with_suffix('.png')}")


def file_of(gpu: bool, quick: bool, folder: Path) -> Path | None:
    """The rows of this machine; without a GPU, those of the GPU that was measured last, or None."""
    if not gpu or torch.cuda.is_available():
        return results_file(quick, gpu_machine() if gpu else None, folder)
    files = [one for one in folder.glob("*.json") if not one.name.startswith(("cpu-", "tuned-", "run.", FIRST_FIGURES))]
    return max(files, key=lambda one: one.stat().st_mtime, default=None)


if __name__ == "__main__":
    main()
