"""Saving from, and loading into, models that FSDP2 has sharded; and what cannot be done with them."""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import MODELS, make_batch, make_model
from processes import needs_sharded_int8, run_in_two
from safetensors.torch import load_file
from test_distributed import TRAINED_ALONE, batch, ddp, patched, train
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fastlora

PREFIX = "base_model.model."


def sharded(name="llama", dtype=torch.float32, **settings):
    return fastlora.shard(patched(dtype, name, **settings))


def in_files(gathered):
    """Names of parameters as PEFT's files have them."""
    return {PREFIX + name.removesuffix(".default") + ".weight": tensor for name, tensor in gathered.items()}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# Saving


def save_trained(rank, folder, quantize):
    """Whether the files of a sharded model are what PyTorch gathers, after a step and after an evaluation."""
    model = sharded(quantize=quantize)
    train(model, batch(rank), steps=2)
    fastlora.save(model, f"{folder}/trained")
    there = os.listdir(f"{folder}/trained")  # in every process, as soon as save is back
    with torch.no_grad():
        logits = model(**batch(rank)).logits
    fastlora.save(model, f"{folder}/evaluated")
    expected = get_model_state_dict(model, options=TRAINED_ALONE)
    again = fastlora.hotswap(sharded(quantize=quantize), f"{folder}/trained")
    with torch.no_grad():
        same_logits = torch.equal(again(**batch(rank)).logits, logits)
    files = [load_file(f"{folder}/{state}/adapter_model.safetensors") for state in ("trained", "evaluated")]
    # PyTorch gathers to the first process.
    return sorted(there), rank > 0 or all(equal(file, in_files(expected)) for file in files), same_logits


@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=needs_sharded_int8)])
def test_a_sharded_model_is_saved_and_swapped(tmp_path, quantize):
    for there, same_files, same_logits in run_in_two(save_trained, str(tmp_path), quantize):
        assert there == ["adapter_config.json", "adapter_model.safetensors"]
        assert same_files
        assert same_logits
    whole = fastlora.load(make_model("llama"), tmp_path / "trained")
    start = patched(name="llama")
    assert not torch.allclose(whole(**make_batch()).logits, start(**make_batch()).logits)


def save_where_it_fails(rank, path):
    try:
        fastlora.save(sharded(), path)
    except OSError as error:
        return type(error).__name__, str(error)


def test_a_failure_to_write_is_one_of_every_process(tmp_path):
    (tmp_path / "file").touch()
    first, second = run_in_two(save_where_it_fails, str(tmp_path / "file" / "adapter"))
    assert first[0] == "NotADirectoryError"
    assert second == ("OSError", f"in the first process: {first[1]}")


def save_modules(rank, folder):
    """What trains of a 16-bit model: float32 adapters and a head and norms in 16 bits."""
    config = fastlora.LoraConfig(r=4, target_modules=MODELS["llama"][1], modules_to_save=["lm_head", "norm"])
    model = make_model("llama", torch.bfloat16)
    before = model.lm_head.weight.detach().clone()
    fastlora.shard(fastlora.patch(model, config=config))
    train(model, batch(rank), steps=2)
    fastlora.save(model, folder)
    trained = model.lm_head.weight.full_tensor()
    file = load_file(f"{folder}/adapter_model.safetensors")
    refused = []
    for action in (lambda: fastlora.set_adapter(model, "default"), lambda: fastlora.disabled(model).__enter__()):
        with pytest.raises(ValueError, match="expected whole parameters in every process"):
            action()
        refused.append(True)
    return (
        torch.equal(file[f"{PREFIX}lm_head.weight"], trained), bool((trained != before).any()),
        isinstance(model.lm_head, FSDPModule), len(refused),
    )  # fmt: skip


def test_trained_modules_of_a_16_bit_model_are_groups_of_their_own(tmp_path):
    assert run_in_two(save_modules, str(tmp_path)) == [(True, True, True, 2)] * 2
    fastlora.load(make_model("llama", torch.bfloat16), tmp_path)


def save_under_ddp(rank, folder):
    model = patched(name="llama")
    wrapper = ddp(model)
    train(wrapper, batch(rank), steps=2)
    with pytest.raises(ValueError, match=r"found DistributedDataParallel with its layers.*wrapper\.module"):
        fastlora.save(wrapper, folder)
    fastlora.save(wrapper.module, folder)  # by both at once
    dist.barrier()
    if rank == 0:
        fastlora.save(model, f"{folder}/first")  # or by one
    dist.barrier()
    files = [load_file(Path(path, "adapter_model.safetensors")) for path in (folder, f"{folder}/first")]
    expected = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return all(equal(file, in_files(expected)) for file in files)


def test_under_ddp_the_model_inside_is_saved(tmp_path):
    assert run_in_two(save_under_ddp, str(tmp_path)) == [True, True]
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors", "first"]


# What is refused


def tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2,))
    plan = {f"model.layers.{i}.self_attn.q_proj": ColwiseParallel() for i in range(2)}
    return parallelize_module(model, mesh, plan)


def fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")).module


def zero3(model):
    """What DeepSpeed's stage 3 leaves: parameters with a number of theirs."""
    model.lm_head.weight.ds_id = 0
    return model


def refusals(rank, folder):
    """The messages of everything that is refused of a sharded model."""
    model = sharded(name="llama")
    merged = fastlora.merge(patched(name="llama"))
    pissa = make_model("llama")
    fastlora.patch(pissa, config=fastlora.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    fastlora.save(patched(name="llama"), f"{folder}/{rank}")
    mixed_dtypes = make_model("llama", torch.bfloat16)
    mixed_dtypes.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(48, dtype=torch.bfloat16))
    fastlora.patch(mixed_dtypes, config=fastlora.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"))
    no_transformer = fastlora.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)), targets=["0"])
    calls = {
        "patch": lambda: fastlora.patch(model, targets=["k_proj"], adapter="other"),
        "load": lambda: fastlora.load(model, f"{folder}/{rank}", "other"),
        "merge": lambda: fastlora.merge(model),
        "unmerge": lambda: fastlora.unmerge(model),
        "unload": lambda: fastlora.unload(model),
        "delete": lambda: fastlora.delete_adapter(model, "default"),
        "rename": lambda: fastlora.rename_adapter(model, "default", "other"),
        "shard": lambda: fastlora.shard(model),
        "shard merged": lambda: fastlora.shard(merged),
        "shard pissa": lambda: fastlora.shard(pissa),
        "shard unpatched": lambda: fastlora.shard(make_model("llama")),
        "shard without blocks": lambda: fastlora.shard(no_transformer),
        "shard two dtypes": lambda: fastlora.shard(mixed_dtypes),
        "patch sharded": lambda: fastlora.patch(fully_shard(make_model("llama"))),
        "patch tensor parallel": lambda: fastlora.patch(tensor_parallel(make_model("llama"))),
        "patch fsdp1": lambda: fastlora.patch(fsdp1(make_model("llama"))),
        "patch zero3": lambda: fastlora.patch(zero3(make_model("llama"))),
        "save fsdp1": lambda: fastlora.save(fsdp1(patched(name="llama")), f"{folder}/{rank}/fsdp1"),
        "forward of a layer": lambda: model.model.layers[0].self_attn.q_proj(torch.zeros(1, 48)),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except (ValueError, TypeError) as error:
            found[name] = str(error)
    return found


WHOLE = "expected whole parameters in every process, found "
REFUSED = {
    "patch": f"{WHOLE}.*patch and load before fully_shard; fastlora.hotswap",
    "load": f"{WHOLE}.*patch and load before fully_shard; fastlora.hotswap",
    "merge": f"{WHOLE}.*placements.*fastlora.merge_checkpoint",
    "unmerge": f"{WHOLE}.*before torch.distributed.fsdp.fully_shard",
    "unload": f"{WHOLE}.*before torch.distributed.fsdp.fully_shard",
    "delete": f"{WHOLE}.*before torch.distributed.fsdp.fully_shard",
    "rename": f"{WHOLE}.*before torch.distributed.fsdp.fully_shard",
    "shard": WHOLE,
    "shard merged": "expected an unmerged model",
    "shard pissa": "expected its original weights",
    "shard unpatched": "expected one that was patched",
    "shard without blocks": "blocks: expected the modules to shard one by one, found none in Sequential",
    "shard two dtypes": "expected each layer to train in one dtype.*bfloat16.*float32.*LoraLinear",
    "patch sharded": f"{WHOLE}.*placements",
    "patch tensor parallel": f"{WHOLE}.*placements",
    "patch fsdp1": f"{WHOLE}.*FSDP1; use torch.distributed.fsdp.fully_shard",
    "patch zero3": f"{WHOLE}lm_head.weight spread by DeepSpeed ZeRO stage 3",
    "save fsdp1": "expected a whole tensor or one that FSDP2 has sharded, found one of FSDP1",
    "forward of a layer": "lora_linear: expected tensors of this process alone, found a DTensor",
}


def test_refused(tmp_path):
    found, again = run_in_two(refusals, str(tmp_path))
    assert found.keys() == again.keys() == REFUSED.keys()
    for name, pattern in REFUSED.items():
        assert re.search(pattern, found[name], re.DOTALL), f"{name}: {found[name]}"


def test_tensor_parallel_models_of_transformers_are_refused():
    """Where its weights are plain tensors of a process, the size alone says so."""
    model = make_model("llama")
    model._tp_size = 2
    with pytest.raises(ValueError, match=r"found a tensor-parallel model \(tp_size=2\)"):
        fastlora.patch(model)


def test_int8_weights_need_a_torch_that_shards_them(monkeypatch):
    model = fastlora.patch(make_model("llama"), r=2, targets="all-linear", quantize="int8")
    kinds = [type(module) for module in model.modules()]
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ValueError, match=r"expected torch 2\.12 or later to shard int8 weights, found torch 2\.11"):
        fastlora.shard(model)
    assert [type(module) for module in model.modules()] == kinds
