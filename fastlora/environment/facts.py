"""Versions, processors, and what would compute on them."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import ops

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "safetensors", "peft", "bitsandbytes", "trl", "datasets",
    "compressed-tensors",
)  # fmt: skip
VARIABLES = ("FASTLORA_LOG", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Environment:
    """What was found.

    Attributes:
        versions: of Python and of packages by name, None for one that is not installed.
        cpu: its name, vector instructions, threads and bytes of memory.
        gpus: of each its name, compute capability and bytes of memory.
        kernels: what computes for inputs of a dtype, in words, by "device dtype".
        variables: those set that change what runs.
    """

    versions: dict[str, str | None]
    cpu: dict[str, Any]
    gpus: list[dict[str, Any]]
    kernels: dict[str, str]
    variables: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_environment() -> Environment:
    """Looks around; nothing heavy is imported, and a GPU is only asked for its properties."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    return Environment(
        versions=versions | {name: _version(name) for name in PACKAGES},
        cpu=_cpu(),
        gpus=[_gpu(index) for index in range(torch.cuda.device_count())],
        kernels={
            f"{device} {str(dtype).removeprefix('torch.')}": ops.describe(device, dtype)
            for device in devices() for dtype in DTYPES
        },
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )  # fmt: skip


def devices() -> list[torch.device]:
    """The CPU and the first GPU, if there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # which tells the build, as a wheel's own version need not
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    has_size = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", ()))
    return {
        "name": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if has_size else None,
    }


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory": found.total_memory,
    }
