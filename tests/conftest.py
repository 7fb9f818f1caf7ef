"""What all tests share. Without a GPU the kernels run in Triton's interpreter, in the same tests."""

import importlib
import os
from importlib.metadata import version

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, so before anything else
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("FASTLORA_TABLES", None)  # what is chosen must not depend on what was tuned

import pytest
from packaging.version import Version

torch.set_num_threads(1)  # tensors are tiny here, and threads that wait for each other on a busy machine are not free


def pytest_configure():
    """Says why the interpreter fails, where it would with every kernel: NumPy no longer takes an array for a number."""
    found = {name: Version(version(name)) for name in ("triton", "numpy")}
    if not torch.cuda.is_available() and found["triton"] < Version("3.7") and found["numpy"] >= Version("2.4"):
        expected = "numpy below 2.4 for the interpreter of triton below 3.7"
        raise pytest.UsageError(f"expected {expected}, found numpy {found['numpy']} and triton {found['triton']}")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["gpu", "cpu"])
def room(request):
    """A room of implementations: `gpu` runs on a GPU or in Triton's interpreter, `cpu` on CPU tensors alone."""
    return importlib.import_module(f"fastlora_kernels.{request.param}")


@pytest.fixture
def where(room, device) -> str:
    """The device that a room's inputs are on."""
    return "cpu" if room.__name__.endswith(".cpu") else device


@pytest.fixture
def calls(monkeypatch) -> list:
    """The inputs of every `ops.lora_linear` that PEFT's layers call."""
    from fastlora import ops

    made, op = [], ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *inputs: made.append(inputs) or op(*inputs))
    return made


@pytest.fixture(autouse=True)
def _reproducible():
    """One seed per test, and memory from torch.empty that holds NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
