"""What a training step costs: over the frozen model, and beside PEFT.

The floor is the frozen base: the same model without adapters, forward and backward down to the embeddings' output.
Every contender goes down to the same place.
"""

from __future__ import annotations

import pytest
import torch
from contenders import (
    BF16,
    base,
    exact_model_of,
    loss_and_gradients,
    make_ids,
    training_step,
    with_fastlora,
    with_peft,
)
from harness import assert_accurate, threads

pytestmark = pytest.mark.cpu
REFERENCES = ["frozen base", "PEFT bf16", "PEFT + bitsandbytes int8"]


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


def bf16_contenders(ids: torch.Tensor, r: int = 16) -> dict:
    """As users get it means adapters in float32 under bf16 autocast, which is what PEFT and Trainer do by default."""
    return {
        "frozen base": training_step(base(), ids),
        "fastlora bf16": training_step(with_fastlora(r), ids),
        "fastlora int8": training_step(with_fastlora(r, quantize="int8"), ids),
        "PEFT bf16": training_step(with_peft(r), ids),
        "PEFT as users get it": training_step(with_peft(r, fp32_adapters=True), ids, autocast=True),
        "PEFT + bitsandbytes int8": training_step(with_peft(r, int8=True), ids),
    }


def test_step(compare):
    check_accuracy()
    compare("training", "512 tokens, r=16", bf16_contenders(make_ids(2, 256)), REFERENCES)


@pytest.mark.full
@pytest.mark.parametrize("tokens", [64, 2048])
def test_step_by_tokens(compare, tokens):
    compare("training", f"{tokens} tokens, r=16", bf16_contenders(make_ids(2, tokens // 2)), REFERENCES)


@pytest.mark.full
@pytest.mark.parametrize("r", [4, 64, 128])
def test_step_by_rank(compare, r):
    contenders = bf16_contenders(make_ids(2, 256), r)
    del contenders["PEFT as users get it"]
    compare("training", f"512 tokens, r={r}", contenders, REFERENCES)


@pytest.mark.full
def test_step_one_thread(compare):
    with threads(1):
        compare("training", "512 tokens, r=16, one thread", bf16_contenders(make_ids(2, 256)), REFERENCES)


@pytest.mark.full
def test_step_fp32(compare):
    ids, fp32 = make_ids(2, 256), torch.float32
    contenders = {
        "frozen base": training_step(base(fp32), ids),
        "fastlora fp32": training_step(with_fastlora(dtype=fp32), ids),
        "fastlora int8, fp32 inputs": training_step(with_fastlora(dtype=fp32, quantize="int8"), ids),
        "PEFT fp32": training_step(with_peft(dtype=fp32), ids),
    }
    compare("training", "512 tokens, r=16, fp32", contenders, ["frozen base", "PEFT fp32"])
