"""What the CPU does differently from machine to machine, and what it says of it."""

import importlib
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import compare
from inputs import backward_inputs, linear_inputs
from models import make_model
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.layers import pages
from fastlora_kernels import cpu, reference
from fastlora_kernels.cpu import linear

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("product", ["own", "float32"])
def test_either_product_dtype(monkeypatch, product, dtype, int8, tokens):
    """Whatever this CPU has kernels for, both of the ways that it might go are right."""
    monkeypatch.setattr(linear, "product_dtype", lambda own: own if product == "own" else torch.float32)
    shape = (tokens, 64, 48, 8)
    draws = [linear_inputs(shape, dtype, "cpu", int8=int8, p=0.1) for _ in range(16)]
    compare(cpu.lora_linear, reference.lora_linear, *draws)
    draws = [backward_inputs(shape, dtype, "cpu", int8=int8, p=0.1) for _ in range(16)]
    compare(cpu.lora_linear_backward, reference.lora_linear_backward, *draws)


def test_wide_products_on_what_is_there():
    assert cpu.product_dtype(torch.float32) == torch.float32
    for dtype in HALVES:
        assert cpu.product_dtype(dtype) in (dtype, torch.float32)


def test_autocast_leaves_the_rooms_alone():
    """A product in float32 inside the operator is not turned back into bfloat16."""
    inputs = linear_inputs((20, 64, 48, 8), torch.float32, "cpu")
    expected = fastlora.ops.lora_linear(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastlora.ops.lora_linear(**inputs), expected)


def test_says_what_runs(caplog):
    caplog.set_level(logging.INFO, "fastlora")
    fastlora.patch(make_model("llama"), r=2, targets=["q_proj", "v_proj"], quantize="int8")
    said = next(record.message for record in caplog.records if "adapter 'default'" in record.message)
    count = 2 * make_model("llama").config.num_hidden_layers
    assert f"on {count} layers, weights in float32 stored as int8; native CPU" in said
    assert "products in float32" in said


def test_warns_where_the_rest_of_the_model_is_slow(caplog, monkeypatch):
    monkeypatch.setattr(cpu, "product_dtype", lambda dtype: torch.float32)
    importlib.import_module("fastlora.patch")._warn_of_slow_dtype.cache_clear()
    fastlora.patch(make_model("llama").bfloat16(), r=2, targets=["q_proj"])
    assert "load the model with dtype=torch.float32" in caplog.text


@pytest.mark.parametrize(("level", "expected"), [("info", "products in"), ("", "")])
def test_environment_switches_messages_on(level, expected):
    code = (
        "import torch, fastlora; "
        "fastlora.patch(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), targets=['0'])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env={"FASTLORA_LOG": level, "PATH": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert expected in result.stderr
    assert bool(result.stderr) == bool(expected)


def test_unknown_log_level():
    result = subprocess.run(
        [sys.executable, "-c", "import fastlora"], env={"FASTLORA_LOG": "loud"}, capture_output=True, text=True
    )
    assert "FASTLORA_LOG: expected one of" in result.stderr


def resident_of(file: Path) -> int:
    """KiB of a mapped file that this process has in memory."""
    smaps = Path("/proc/self/smaps").read_text()
    sections = re.findall(rf"{re.escape(str(file))}\n.*?^Rss: +(\d+) kB", smaps, re.DOTALL | re.MULTILINE)
    return sum(map(int, sections))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such call, and nothing is released")
def test_mapped_pages_are_released(tmp_path):
    file = tmp_path / "weights.safetensors"
    weights = {name: torch.randn(512, 1024) for name in "abcd"}
    save_file(weights, file)
    mapped = load_file(file)
    assert all(torch.equal(mapped[name], weights[name]) for name in "abcd")
    before = resident_of(file)
    if before == 0:
        pytest.skip("this version of safetensors copies what it loads")
    pages.release_pages(mapped["b"])
    assert resident_of(file) <= before - 1900
    assert torch.equal(mapped["b"], weights["b"])


def test_memory_of_its_own_stays():
    tensor = torch.randn(512, 1024)
    expected = tensor.clone()
    pages.release_pages(tensor)
    assert torch.equal(tensor, expected)
