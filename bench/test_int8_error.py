"""How far int8 activations are from the product of the dense weight, beside bitsandbytes', with planted outliers."""

from __future__ import annotations

import pytest
import torch
from gpu import NotInstalledError
from gpu_layers import BF16, Place, Shape
from harness import rms, rows_from_values, rows_not_run
from peers import bitsandbytes_linear
from torch import Tensor, nn

from fastlora import ops
from fastlora_kernels import reference

OUTLIER_FEATURES, OUTLIER_SIZE = 6, 20.0  # as the larger OPT models have, by LLM.int8()


def planted(shape: Shape) -> Tensor:
    """Activations of which a few features are large in every token."""
    x = shape.x(0)
    x[:, torch.randperm(shape.K)[:OUTLIER_FEATURES].to(x.device)] *= OUTLIER_SIZE
    return x


@torch.no_grad()
def errors(shape: Shape) -> tuple[dict[str, float], dict[str, str]]:
    """RMS error over the RMS of the exact output, per contender; and who could not run, with the reason."""
    x, weight = planted(shape), shape.weight(0)
    exact = x.double() @ weight.double().T
    w, w_scale = ops.quantize_rows(weight)
    found = {
        "bf16": x @ weight.T,
        "fastlora int8": ops.lora_linear(x, w, w_scale),
        "fastlora int8, compute int8": ops.lora_linear(x, w, w_scale, threshold=reference.OUTLIER_THRESHOLD),
        "the same without outliers apart": ops.lora_linear(x, w, w_scale, threshold=torch.inf),
    }
    notes = {}
    try:
        linear = nn.Linear(shape.K, shape.N, bias=False, device="meta", dtype=BF16)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        found["bitsandbytes int8"] = bitsandbytes_linear(linear, x.device).eval()(x)
    except NotInstalledError as error:
        notes["bitsandbytes int8"] = f"not installed: {error}"
    return {name: rms(y.double() - exact) / rms(exact) for name, y in found.items()}, notes


def report(record, shape: Shape) -> None:
    values, notes = errors(shape)
    # Of the product of the codes, nothing is lost; what is, bitsandbytes loses, too.
    assert values["fastlora int8"] <= values["fastlora int8, compute int8"] < values["the same without outliers apart"]
    question, case = "error of int8 activations", f"{shape.M} x {shape.K} -> {shape.N}, {OUTLIER_FEATURES} outliers"
    rows = rows_from_values(question, case, values, ["bf16", "bitsandbytes int8"], "of the RMS", shape.sizes)
    record(rows + rows_not_run(question, case, notes))


@pytest.mark.cpu
def test_on_cpu(record):
    report(record, Shape(128, 1024, 512, 16, 0.0, Place("cpu", tiny=False)))


@pytest.mark.gpu
def test_on_gpu(record, place):
    report(record, Shape(512, 4096, 4096, 16, 0.0, place) if not place.tiny else Shape(32, 64, 48, 16, 0.0, place))
