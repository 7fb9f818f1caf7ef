"""What a training step holds for its backward, and how far the process' memory rises, in a step and in quantising."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from contenders import BF16, NATIVE, SHAPE, TARGETS, base, make_ids, training_loss, with_fastlora, with_peft
from gpu_layers import Place
from gpu_models import frozen, held_by_linears, ours, peft_model
from harness import rows_from_values
from memory import bytes_for_backward
from peak import ADAPT, LOAD_AND_QUANTIZE, QUANTIZE

pytestmark = pytest.mark.cpu
MIB = 1 << 20
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_bytes_for_backward(record):
    """The floor is what the frozen base holds and the inputs of the targets, where two that share one count once."""
    ids = make_ids(2, 256)
    models = {
        "frozen base": base(),
        "fastlora bf16": with_fastlora(),
        "fastlora int8": with_fastlora(quantize="int8"),
        "PEFT bf16": with_peft(),
        "PEFT + bitsandbytes int8": with_peft(int8=True),
    }
    values = {name: bytes_for_backward(model, training_loss(model, ids)) / MIB for name, model in models.items()}
    frozen = models["frozen base"]
    targets = {name for name, _ in frozen.named_modules() if name.rsplit(".")[-1] in TARGETS}
    values["floor"] = bytes_for_backward(frozen, training_loss(frozen, ids), inputs_of=targets) / MIB
    record(rows_from_values("bytes for backward", "512 tokens, r=16", values, ["floor", "frozen base"], "MiB"))


def test_bytes_for_backward_of_a_large_layer(record):
    """Counted at 64 tokens and given for 8192: all of it grows with the tokens."""
    place, count, wanted = Place("cpu", tiny=False), 64, 8192
    contenders = {"frozen": frozen, "fastlora bf16": ours, "PEFT bf16": peft_model}
    values = {name: held_by_linears(adapt, place, count) / MIB * wanted / count for name, adapt in contenders.items()}
    case = f"linears and activation, {wanted} tokens"
    record(rows_from_values("bytes for backward, Llama-8B", case, values, ["frozen", "PEFT bf16"], "MiB"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    base().save_pretrained(folder / "model")
    tiny = transformers.LlamaConfig(**(SHAPE | TINY), pad_token_id=0)
    transformers.LlamaForCausalLM(tiny).save_pretrained(folder / "tiny")
    return folder


def rises(what: list[str], folder: Path) -> dict[str, float]:
    """MiB by which memory rises in a fresh process per thing to do."""
    command = [sys.executable, str(Path(__file__).parent / "peak.py")]
    found = {}
    for name in what:
        result = subprocess.run([*command, name, str(folder)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found[name] = int(result.stdout.split()[-1]) / MIB
    return found


def model_and_layer(dtype: torch.dtype) -> tuple[float, float]:
    """MiB of the model's weights, and of those of one decoder layer."""
    model = base(dtype)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    return sum(parameter.nbytes for parameter in model.parameters()) / MIB, layer / MIB


def test_peak_of_quantising(record, checkpoints):
    model, layer = model_and_layer(BF16)
    values = rises([QUANTIZE, LOAD_AND_QUANTIZE], checkpoints)
    values |= {"bf16 model": model, "bf16 model + one layer": model + layer}
    over = ["bf16 model", "bf16 model + one layer"]
    record(rows_from_values("peak of quantising", "bf16 to int8", values, over, "MiB"))


@pytest.mark.full
def test_peak_of_step(record, checkpoints):
    model, _ = model_and_layer(NATIVE)
    values = rises(list(ADAPT), checkpoints) | {"weights": model}
    case = f"512 tokens, r=16, {str(NATIVE).removeprefix('torch.')}"
    record(rows_from_values("peak of a step", case, values, ["frozen base", "weights", "PEFT"], "MiB"))
