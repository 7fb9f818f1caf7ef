"""What each measured figure is held to. Lower is better in all of them.

`reach` is what must be reached and `aim` what is worth going for, both as upper bounds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """Bounds for `contender / over`, or for the contender's own figure where `over` is None."""

    question: str
    contender: str
    over: str | None
    reach: float
    aim: float | None
    case: str = ""  # a regular expression that is found in the case


CPU_TARGETS = [
    Target("training", "fastlora (bf16|fp32)", "frozen base", 1.3, 1.15),
    Target("training", "fastlora int8.*", "frozen base", 1.5, 1.3),
    Target("training", "fastlora bf16", "PEFT bf16", 1 / 2, None),
    Target("training", "fastlora fp32", "PEFT fp32", 1 / 2, None),
    Target("training", "fastlora int8", "PEFT + bitsandbytes int8", 1 / 2.5, None),
    Target("bytes for backward", "fastlora .*", "floor", 1.05, 1.02),
    Target("bytes for backward, Llama-8B", "fastlora bf16", None, 700, 650),
    Target("decode", "fastlora int8", "bf16 without LoRA", 1 / 2, 1 / 4),
    Target("generate", "fastlora int8", "bf16 without LoRA", 1.0, None),
    Target("overhead", "fastlora", None, 15.0, 10.0, case="^forward( without grad)?,"),
    Target("peak of quantising", "quantise|load and quantise", "bf16 model + one layer", 1.0, None),
]
GPU_TARGETS = [  # the cases are those of the sizes that they were set for
    Target("linear, forward", "fastlora bf16", "PEFT bf16", 1 / 1.25, 1 / 1.32, case="^8192 x 4096 -> 4096,"),
    Target("linear, forward + backward", "fastlora bf16", "PEFT bf16", 1 / 1.25, 1 / 1.31, case="-> 4096,"),
    Target("linear, forward + backward", "fastlora bf16", "PEFT bf16", 1 / 1.15, 1 / 1.2, case="-> 14336,"),
    Target("linear, forward + backward", "fastlora bf16", "PEFT as users get it", 1 / 1.55, 1 / 1.63, case="-> 4096,"),
    Target("linear, forward + backward", "fastlora bf16", "PEFT as users get it", 1 / 1.25, 1 / 1.3, case="-> 14336,"),
    Target("group, forward + backward", "fastlora bf16", "PEFT bf16", 1 / 1.45, 1 / 1.55, case="^q, k, v of Llama"),
    Target("seven linears", "fastlora bf16", "PEFT bf16", 1 / 1.2, 1 / 1.25),
    Target("int8, forward + backward", "fastlora int8", "fastlora bf16", 1.05, 1.035),
    Target("int8, forward + backward", "fastlora int8", "PEFT + bitsandbytes int8", 1 / 1.35, 1 / 1.45),
    Target("decode", "fastlora int8", "bf16 without LoRA, cuBLAS", 1 / 1.3, 1 / 1.6, case="-> 4096,.*graph"),
    Target("decode", "fastlora int8", "bf16 without LoRA, cuBLAS", 1 / 1.6, 1 / 1.8, case="-> 14336,.*graph"),
    Target("decode", "fastlora int8", "PEFT bf16", 1 / 2, 1 / 3, case="graph"),
    Target("decode", "fastlora int8", "PEFT bf16", 1 / 8, 1 / 12, case="by Python"),
    Target("mixed batch", "fastlora", "one adapter", 1.05, 1.02, case="^[48] adapters, 8192 x"),
    Target("merge", "fastlora", "copy of as many bytes", 1 / 0.7, 1 / 0.85),
    Target("bytes for backward, GPU", "fastlora bf16", None, 700, 650, case="^linears.* 8192 tokens"),
]
TARGETS = CPU_TARGETS + GPU_TARGETS


def target_of(row: dict[str, Any], over: str | None) -> Target | None:
    """The target of a row's ratio over another contender, or of its own figure, if there is one."""
    for target in TARGETS:
        fits = target.question == row["question"] and target.over == over
        if fits and re.fullmatch(target.contender, row["contender"]) and re.search(target.case, row["case"]):
            return target
    return None


def rows_of(target: Target, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that a target is for, those that were not measured left out."""
    return [
        row for row in rows
        if row["median"] is not None and target_of(row, target.over) is target
        and (target.over is None or target.over in row["ratios"])
    ]  # fmt: skip


def verdict(value: float, target: Target) -> str:
    if target.aim is not None and value <= target.aim:
        return "aim"
    return "reach" if value <= target.reach else "no"
