"""What one token costs with unmerged adapters, behind a cache, and what `model.generate` makes of it."""

from __future__ import annotations

import pytest
import torch
from contenders import base, decode_step, exact_model_of, generation, with_fastlora, with_peft
from harness import assert_accurate, threads

pytestmark = pytest.mark.cpu
CONTEXT, NEW_TOKENS = 64, 32
REFERENCES = ["bf16 without LoRA", "PEFT bf16"]


@pytest.fixture(scope="module")
def models() -> dict:
    return {
        "bf16 without LoRA": base(),
        "fastlora int8": with_fastlora(quantize="int8"),
        "fastlora bf16": with_fastlora(),
        "PEFT bf16": with_peft(),
    }


def check_accuracy(models: dict) -> None:
    """The logits of a decode step: fastlora's errors against float32 are those of PEFT in bf16."""
    exact = decode_step(with_peft(dtype=torch.float32), CONTEXT)()
    exact_int8 = decode_step(exact_model_of(models["fastlora int8"]), CONTEXT)()
    eager_error = decode_step(models["PEFT bf16"], CONTEXT)() - exact
    assert_accurate("decode, bf16", decode_step(models["fastlora bf16"], CONTEXT)() - exact, eager_error)
    assert_accurate("decode, int8", decode_step(models["fastlora int8"], CONTEXT)() - exact_int8, eager_error)


def test_decode(compare, models):
    check_accuracy(models)
    contenders = {name: decode_step(model, CONTEXT) for name, model in models.items()}
    compare("decode", f"1 token behind {CONTEXT}", contenders, REFERENCES)


@pytest.mark.full
def test_decode_one_thread(compare, models):
    with threads(1):
        contenders = {name: decode_step(model, CONTEXT) for name, model in models.items()}
        compare("decode", f"1 token behind {CONTEXT}, one thread", contenders, REFERENCES)


def test_generate(compare, models):
    contenders = {name: generation(model, CONTEXT, NEW_TOKENS) for name, model in models.items()}
    compare("generate", f"{NEW_TOKENS} tokens behind {CONTEXT}", contenders, REFERENCES)
