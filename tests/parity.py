"""Every feature of PEFT's LoRA on every architecture of the zoo: the cells, and the table of them in the docs.

`python tests/parity.py > docs/parity.md` writes the table; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo import ZOO, Architecture

Settings = Callable[[Architecture], dict[str, Any]]

FEATURES: dict[str, Settings] = {
    "LoRA": lambda architecture: {},
    "rsLoRA": lambda architecture: dict(use_rslora=True),
    "DoRA": lambda architecture: dict(use_dora=True),
    "lora_bias": lambda architecture: dict(lora_bias=True),
    "bias=all": lambda architecture: dict(bias="all"),
    "bias=lora_only": lambda architecture: dict(bias="lora_only"),
    "modules_to_save": lambda architecture: dict(modules_to_save=[architecture.saved]),
    "patterns": lambda architecture: dict(
        rank_pattern={architecture.targets[0]: 3}, alpha_pattern={architecture.targets[-1]: 5}
    ),
    "all-linear": lambda architecture: dict(target_modules="all-linear"),
}  # fmt: skip

WHAT = """# What was compared with PEFT

Each cell is a test, `tests/test_parity.py`, against peft 0.21 on a tiny random model in float64: the same initial
adapter under one seed; equal logits and gradients; equal logits after 5 steps of AdamW; the files of each loaded by the
other, tensors equal byte for byte; logits when merged, and every bit back when unmerged; the plain model's logits when
disabled; a second adapter, and back.
"""


# Cells where the two mean different things, or PEFT fails, and why.
NOT_COMPARED = {
    ("mixtral", "all-linear"): "PEFT adapts the experts, too; here they are named in target_parameters",
    ("qwen3-moe", "all-linear"): "PEFT adapts the experts, too; here they are named in target_parameters",
    ("wav2vec2", "all-linear"): "PEFT cannot save it: the model has no input embeddings",
}


def cells() -> list[tuple[str, str]]:
    return [(name, feature) for name in ZOO for feature in FEATURES if (name, feature) not in NOT_COMPARED]


def table() -> str:
    header = ["architecture", "class", "targets", *FEATURES]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, architecture in ZOO.items():
        targets = ", ".join(architecture.targets)
        marks = ["no" if (name, feature) in NOT_COMPARED else "yes" for feature in FEATURES]
        lines.append("| " + " | ".join([name, architecture.model, targets, *marks]) + " |")
    reasons = [f"- {name}, {feature}: {reason}." for (name, feature), reason in NOT_COMPARED.items()]
    return f"{WHAT}\n" + "\n".join(lines) + "\n\nNot compared:\n\n" + "\n".join(reasons) + "\n"


if __name__ == "__main__":
    print(table(), end="")
