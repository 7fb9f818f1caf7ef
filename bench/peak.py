"""How far a process' memory rises: `python bench/peak.py WHAT FOLDER` prints it in bytes.

Each run is a process of its own, so that nobody's freed memory is left for the next one. FOLDER holds two checkpoints,
`tiny` and `model`. The tiny one goes first, unmeasured, since imports and thread pools take memory too.
"""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from contenders import BF16, NATIVE, TARGETS, make_ids, training_step, with_fastlora, with_peft
from torch import nn

import fastlora

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
ADAPT: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen base": lambda model: model.requires_grad_(False),
    "fastlora": lambda model: with_fastlora(model=model),
    "fastlora int8": lambda model: with_fastlora(model=model, quantize="int8"),
    "PEFT": lambda model: with_peft(model=model),
    "PEFT + bitsandbytes int8": lambda model: with_peft(model=model, int8=True),
}
QUANTIZE = "quantise"
LOAD_AND_QUANTIZE = "load and quantise"


def rise_of_step(adapt: Callable[[nn.Module], nn.Module], folder: Path) -> int:
    """Memory of a model with its adapters and of the two training steps that it then does, at their peak."""
    training_step(adapt(load(folder / "tiny", NATIVE)), make_ids(2, 8))()
    before = settle()
    step = training_step(adapt(in_memory(load(folder / "model", NATIVE))), make_ids(2, 256))
    settle()
    step(), step()
    return peak_bytes() - before


def rise_of_quantizing(folder: Path, mapped: bool) -> int:
    """Memory of a model while `patch` makes it int8, at its peak.

    Args:
        mapped: the weights are those that transformers maps from the file, whose pages count as they are read and
            stay for as long as any tensor of the file lives; otherwise they are in memory already.
    """
    place = (lambda model: model) if mapped else in_memory
    quantized(place(load(folder / "tiny")))
    before = settle()
    model = place(load(folder / "model"))
    settle()
    quantized(model)
    return peak_bytes() - before


def quantized(model: nn.Module) -> nn.Module:
    return fastlora.patch(model, r=16, targets=TARGETS, quantize="int8")


def load(folder: Path, dtype: torch.dtype = BF16) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def in_memory(model: nn.Module) -> nn.Module:
    """The model with weights that are mapped from no file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def settle() -> int:
    """Drops what is not in use, starts the peak anew, and returns the bytes resident now."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_bytes()  # a peak that cannot be reset is the best base for the next one
    return process_status("VmRSS")


def peak_bytes() -> int:
    """The most this process has had resident since the peak was reset, or ever where it cannot be."""
    # Linux hands ru_maxrss down from the parent process; the process' own peak is in /proc.
    return process_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def process_status(name: str) -> int:
    """A field of /proc/self/status in bytes, 0 where there is none."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def rise(what: str, folder: Path) -> int:
    if what in ADAPT:
        return rise_of_step(ADAPT[what], folder)
    return rise_of_quantizing(folder, mapped=what == LOAD_AND_QUANTIZE)


if __name__ == "__main__":
    print(rise(sys.argv[1], Path(sys.argv[2])))
