"""`save_pretrained` of a model that FSDP2 has sharded: by every process, or of what one has gathered."""

import torch
from processes import run_in_two
from safetensors.torch import load_file
from test_distributed import TRAINED_ALONE, batch, patched, train
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from training import assert_same

import fastlora


def save(rank, folder):
    model = fastlora.shard(patched(torch.float32, "llama"))
    train(model, batch(rank), steps=2)
    model.save_pretrained(f"{folder}/own", is_main_process=rank == 0)
    fastlora.save(model, f"{folder}/saved")
    gathered = get_model_state_dict(model, options=TRAINED_ALONE)  # to the first process
    model.save_pretrained(f"{folder}/given", is_main_process=rank == 0, state_dict=gathered)


def test_a_sharded_model_writes_what_is_gathered_of_it(tmp_path):
    run_in_two(save, str(tmp_path))
    for name in ("model.safetensors", "adapter_model.safetensors"):
        assert_same(load_file(tmp_path / "own" / name), load_file(tmp_path / "given" / name))
    name = "adapter_model.safetensors"
    assert_same(load_file(tmp_path / "own" / name), load_file(tmp_path / "saved" / name))
    alone = patched(torch.float32, "llama")
    assert not alone.load_state_dict(load_file(tmp_path / "own" / "model.safetensors"), strict=False).missing_keys
