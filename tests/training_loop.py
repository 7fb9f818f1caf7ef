"""A loop over steps with checkpoints, as a user writes it for many processes; also a script for their launchers."""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from models import MODELS, make_batch, make_model
from processes import INT8
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import fastlora

TRAINED_ALONE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def train(rank, engine, folder, steps, dies_at=None):
    """The losses in this process. A checkpoint is written after each step, and the last one is gone on from.

    Args:
        dies_at: the step in whose midst the second process kills itself.
    """
    model = fastlora.patch(make_model("llama"), r=4, targets=MODELS["llama"][1], dropout=0.2, quantize=INT8).train()
    wrapped, backward = model, torch.Tensor.backward
    if engine == "fsdp2":
        fastlora.shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    elif engine == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
    torch.manual_seed(100 + rank)  # each process its own masks
    first, losses = resume(model, optimizer, Path(folder, "state.pt"), rank)
    for step in range(first, steps):
        inputs = {name: rows.chunk(2)[rank] for name, rows in make_batch(batch=4, seed=step).items()}
        loss = wrapped(**inputs).loss
        if step == dies_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if engine != "accelerate":
            checkpoint(model, optimizer, Path(folder, "state.pt"), losses)
    fastlora.save(model, Path(folder, "adapter"))
    return losses


def checkpoint(model, optimizer, file, losses):
    """What trains, the optimizer's state, every process' generator and losses: gathered, and written by the first."""
    weights, state = get_state_dict(model, optimizer, options=TRAINED_ALONE)
    own = {"generator": torch.get_rng_state(), "losses": losses}
    of_processes = [None] * dist.get_world_size()
    dist.all_gather_object(of_processes, own)
    if dist.get_rank() == 0:
        temporary = file.with_suffix(".tmp")
        torch.save({"weights": weights, "optimizer": state, "processes": of_processes}, temporary)
        os.replace(temporary, file)
    dist.barrier()


def resume(model, optimizer, file, rank):
    """The step to go on with, and the losses until then."""
    if not file.exists():
        return 0, []
    found = torch.load(file, weights_only=True)
    set_state_dict(
        model, optimizer, model_state_dict=found["weights"], optim_state_dict=found["optimizer"],
        options=StateDictOptions(full_state_dict=True, strict=False),
    )  # fmt: skip
    own = found["processes"][rank]
    torch.set_rng_state(own["generator"])
    return len(own["losses"]), own["losses"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.engine != "accelerate":  # which starts the group itself
        dist.init_process_group("gloo")
    own_rank = int(os.environ["RANK"])
    found_losses = train(own_rank, arguments.engine, arguments.folder, arguments.steps)
    Path(arguments.folder, f"losses-{own_rank}.json").write_text(json.dumps(found_losses))
    dist.destroy_process_group()
