"""Merging and exporting on disk beside copying the same files, in turn, and the memory that they take.

`FASTLORA_BENCH_GB` is the size of the checkpoint and `FASTLORA_BENCH_DIR` where it goes, both made and removed here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import Laps, rows_from_samples, rows_from_values
from safetensors.torch import save_file

pytestmark = pytest.mark.cpu
ROUNDS = 3
LAYERS, VOCABULARY, RANK = 8, 32000, 16
MIB = 1 << 20
FORMATS = {"merge_checkpoint": "merge_checkpoint", "export_checkpoint to int8": "int8"}  # as merge_once.py says them
ALLOWED = 500 * 10**6  # bytes, beside four times the largest tensor


def shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """The linear layers of a Llama block of the proportions of the 8B one."""
    wide, narrow = hidden * 7 // 2, hidden // 4
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
    }  # fmt: skip


def make_base(folder: Path, hidden: int) -> None:
    """A checkpoint of a layer per file; random values are drawn once, and every tensor begins elsewhere in them."""
    folder.mkdir()
    drawn = (torch.randn(1 << 24) * 0.02).bfloat16()

    def values(*shape: int) -> torch.Tensor:
        size = shape[0] * shape[1]
        return drawn.roll(size % 977).repeat(-(-size // len(drawn)))[:size].view(shape)

    places = {}
    for layer in range(LAYERS):
        tensors = {f"model.layers.{layer}.{name}.weight": values(*shape) for name, shape in shapes(hidden).items()}
        if layer in (0, LAYERS - 1):
            tensors[("lm_head" if layer else "model.embed_tokens") + ".weight"] = values(VOCABULARY, hidden)
        file = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))


def make_adapter(folder: Path, hidden: int) -> None:
    folder.mkdir()
    tensors = {}
    for layer in range(LAYERS):
        for name, (N, K) in shapes(hidden).items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, K) / 50
            tensors[f"{path}.lora_B.weight"] = torch.randn(N, RANK) / 50
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": 2 * RANK, "peft_type": "LORA", "target_modules": [*shapes(hidden)]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path):
    place = Path(os.environ.get("FASTLORA_BENCH_DIR", tmp_path)) / "merge"
    place.mkdir()
    yield place
    shutil.rmtree(place)


def test_merging_beside_copying(folder, quick, benchmark, record):
    gigabytes = float(os.environ.get("FASTLORA_BENCH_GB", 0.5 if quick else 4))
    hidden = round(4096 * (gigabytes / 4) ** 0.5) // 64 * 64
    make_base(folder / "base", hidden)
    make_adapter(folder / "adapter", hidden)
    size = sum(file.stat().st_size for file in (folder / "base").iterdir())
    samples: dict[str, list[float]] = {}
    memory: dict[str, list[tuple[int, int]]] = {}

    def copied() -> None:
        subprocess.run(["cp", "-r", folder / "base", folder / "copy"], check=True)
        os.sync()

    def merged(name: str) -> None:
        paths = [folder / "base", folder / "adapter", folder / FORMATS[name]]
        command = [sys.executable, str(Path(__file__).with_name("merge_once.py")), FORMATS[name], *map(str, paths)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, rise, peak = result.stdout.split()[-3:]
        samples.setdefault(name, []).append(float(seconds))
        memory.setdefault(name, []).append((int(rise), int(peak)))

    laps = Laps({"cp + sync": copied} | {name: partial(merged, name) for name in FORMATS})

    def lap() -> None:
        for name in ("copy", *FORMATS.values()):
            shutil.rmtree(folder / name, ignore_errors=True)
        os.sync()
        laps()

    benchmark.pedantic(lap, rounds=1 if quick else ROUNDS, iterations=1)
    laps.samples |= samples  # without the start of an interpreter
    case = f"{LAYERS} shards, {size / 1e9:.1f} GB bf16, r={RANK}"
    record(rows_from_samples("merge on disk", case, laps, ["cp + sync"], unit="s", factor=1))
    largest = VOCABULARY * hidden * 2
    values = {"largest tensor": largest / MIB}
    for name, found in memory.items():
        rise, peak = max(found)
        allowed = 4 * largest + ALLOWED
        assert peak <= allowed, f"{name}: expected at most {allowed} bytes resident, found {peak}"
        values[name] = rise / MIB
    record(rows_from_values("memory of a merge on disk", case, values, ["largest tensor"], "MiB"))
