"""PeftModels on fastlora's ops: files, copies and swapped adapters."""

import copy
import json

import peft
import pytest
import torch
from models import make_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import assert_same_logits, logits, make_pair, make_peft, patched
from test_against_peft import smooth

from fastlora.integrations.peft import plan

pytestmark = pytest.mark.filterwarnings("ignore:(fan_in_fan_out|Already found a|.*checkpointing. is deprecated)")

NAMES = ["llama", "gpt2", "bert", "t5"]


def files_of(folder):
    """The bytes of the tensors, and the settings, whose set of targets PEFT writes in any order."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].sort()
    return (folder / "adapter_model.safetensors").read_bytes(), config


@pytest.mark.parametrize("name", NAMES)
def test_saves_the_files_of_peft(name, tmp_path, calls):
    ours, twin = make_pair(name)
    for model, folder in ((ours, "ours"), (twin, "twin")):
        model.save_pretrained(tmp_path / folder)
    tensors, configs = zip(*(files_of(tmp_path / folder) for folder in ("ours", "twin")), strict=True)
    assert tensors[0] == tensors[1]
    assert configs[0] == configs[1]
    plain = smooth(make_model(name))
    assert_same_logits(ours, peft.PeftModel.from_pretrained(plain, tmp_path / "ours"))
    calls.clear()
    ours.load_adapter(tmp_path / "twin", "again")
    ours.set_adapter("again")
    assert_same_logits(ours, twin)
    assert len(calls) == len(patched(ours))


def test_swaps_an_adapter_of_another_rank(tmp_path):
    make_peft(seed=5, r=6, lora_alpha=3).save_pretrained(tmp_path)
    ours, twin = make_pair()
    for model in (ours, twin):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(ours.eval(), fullgraph=True, backend="aot_eager")
    before = logits(compiled)
    for model in (ours, twin):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert {verdict for _, verdict, _ in plan(ours)} == {"fast"}
    with torch.compiler.set_stance("fail_on_recompile"):
        after = logits(compiled)
    assert torch.equal(after, logits(ours))
    assert not torch.equal(after, before)
    assert_same_logits(ours, twin)


COPIES = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "torch-save": lambda model, folder: torch.save(model, folder / "m") or torch.load(folder / "m", weights_only=False),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_copies_run_on_the_ops_too(duplicate, tmp_path, calls):
    ours, _ = make_pair()
    other, expected = duplicate(ours, tmp_path), logits(ours)
    calls.clear()
    assert torch.equal(logits(other), expected)
    assert len(calls) == len(patched(other)) == len(patched(ours))


def test_state_dict_is_that_of_peft(tmp_path):
    ours, twin = make_pair()
    torch.save(ours.state_dict(), tmp_path / "state")
    other = make_peft(seed=7)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(logits(other), logits(twin))
