"""What a training step costs: over the frozen model, and beside PEFT.

The floor is the frozen base: the same model without adapters, forward and backward down to the embeddings' output.
Every contender goes down to the same place.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contenders import (
    BF16,
    NATIVE,
    base,
    exact_model_of,
    loss_and_gradients,
    make_ids,
    training_step,
    with_fastlora,
    with_peft,
)
from harness import assert_accurate, threads
from torch import Tensor

pytestmark = pytest.mark.cpu
REFERENCES = ["frozen base", "PEFT bf16", "PEFT + bitsandbytes int8"]
FP32_REFERENCES = ["frozen base", "PEFT fp32"]


def check_accuracy() -> None:
    """Loss, logits and gradients, without dropout: fastlora's errors against float32 are those of PEFT in bf16.

    The int8 contender is held to a float32 model with the weights that its codes stand for.
    """
    ids, int8_model = make_ids(1, 64), with_fastlora(quantize="int8")
    eager, exact = loss_and_gradients(with_peft(), ids), loss_and_gradients(with_peft(dtype=torch.float32), ids)
    dense, int8 = loss_and_gradients(with_fastlora(), ids), loss_and_gradients(int8_model, ids)
    exact_int8 = loss_and_gradients(exact_model_of(int8_model), ids)
    # A single number can be right by luck, so its bound is the rounding of bf16 and not the error that eager has.
    allowed = torch.finfo(BF16).eps * exact["loss"].abs()
    assert (dense["loss"] - eager["loss"]).abs() <= allowed, (dense["loss"], eager["loss"])
    assert (int8["loss"] - exact_int8["loss"]).abs() <= allowed, (int8["loss"], exact_int8["loss"])
    for what in ("logits", "gradient of the inputs", "gradients of the adapters"):
        eager_error = eager[what] - exact[what]
        assert_accurate(f"bf16, {what}", dense[what] - exact[what], eager_error)
        assert_accurate(f"int8, {what}", int8[what] - exact_int8[what], eager_error)


def bf16_contenders(ids: Tensor, r: int = 16) -> dict:
    """As users get it means adapters in float32 under bf16 autocast, which is what PEFT and Trainer do by default."""
    return {
        "frozen base": training_step(base(), ids),
        "fastlora bf16": training_step(with_fastlora(r), ids),
        "fastlora int8": training_step(with_fastlora(r, quantize="int8"), ids),
        "PEFT bf16": training_step(with_peft(r), ids),
        "PEFT as users get it": training_step(with_peft(r, fp32_adapters=True), ids, autocast=True),
        "PEFT + bitsandbytes int8": training_step(with_peft(r, int8=True), ids),
    }


def fp32_contenders(ids: Tensor, r: int = 16) -> dict:
    dtype = torch.float32
    return {
        "frozen base": training_step(base(dtype), ids),
        "fastlora fp32": training_step(with_fastlora(r, dtype=dtype), ids),
        "fastlora int8, fp32 inputs": training_step(with_fastlora(r, dtype=dtype, quantize="int8"), ids),
        "PEFT fp32": training_step(with_peft(r, dtype=dtype), ids),
    }


def compare_natively(compare: Callable[..., None], case: str, ids: Tensor, r: int = 16) -> None:
    """Compares in bf16, or in fp32 on a CPU without kernels for bf16, where a step of PEFT takes a minute."""
    if NATIVE == BF16:
        compare("training", case, bf16_contenders(ids, r), REFERENCES)
    else:
        compare("training", f"{case}, fp32", fp32_contenders(ids, r), FP32_REFERENCES)


def test_step(compare):
    check_accuracy()
    compare("training", "512 tokens, r=16", bf16_contenders(make_ids(2, 256)), REFERENCES)


def test_step_fp32(compare):
    compare("training", "512 tokens, r=16, fp32", fp32_contenders(make_ids(2, 256)), FP32_REFERENCES)


@pytest.mark.full
@pytest.mark.parametrize("tokens", [64, 2048])
def test_step_by_tokens(compare, tokens):
    compare_natively(compare, f"{tokens} tokens, r=16", make_ids(2, tokens // 2))


@pytest.mark.full
@pytest.mark.parametrize("r", [4, 64, 128])
def test_step_by_rank(compare, r):
    compare_natively(compare, f"512 tokens, r={r}", make_ids(2, 256), r)


@pytest.mark.full
def test_step_one_thread(compare):
    with threads(1):
        compare_natively(compare, "512 tokens, r=16, one thread", make_ids(2, 256))
