"""Training in two processes, by DDP and by FSDP2, beside training in one."""

import ctypes
import gc
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from models import MODELS, make_batch, make_model
from processes import PROCESSES, needs_sharded_int8, run_in_two
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.nn.parallel import DistributedDataParallel

import fastlora

HALF_THE_DIGITS = torch.finfo(torch.float64).eps ** 0.5
TRAINED_ALONE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def patched(dtype=torch.float32, name="gpt2", quantize=None, dropout=0.0, **settings):
    """The same in every process and every dtype. GPT-2 computes all of itself in float64, as Llama does not."""
    config = fastlora.LoraConfig(
        r=4, lora_alpha=4, target_modules=MODELS[name][1], lora_dropout=dropout, **settings
    )  # fmt: skip
    return fastlora.patch(make_model(name), config=config, quantize=quantize).to(dtype)


def batch(rank=None):
    """Four rows, or the two of a process; as many tokens in each, so that a mean of means is the mean."""
    whole = make_batch(batch=4)
    return whole if rank is None else {name: rows.chunk(PROCESSES)[rank] for name, rows in whole.items()}


def optimizer_of(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def loss_of(model, inputs):
    """The mean over tokens, in the model's dtype; transformers computes it in float32."""
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def train(model, inputs, steps=20, optimizer=None):
    """The loss of each step, the mean over all processes."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= PROCESSES
    return losses.tolist()


def ddp(model):
    return DistributedDataParallel(model)


ENGINES = {"ddp": ddp, "fsdp2": fastlora.shard}


KINDS = {"dense": {}, "int8": {"quantize": "int8"}, "dora": {"use_dora": True}}


def losses_of_engines(rank, kind):
    return {
        (name, str(dtype)): train(engine(patched(dtype, **KINDS[kind])), batch(rank))
        for name, engine in ENGINES.items()
        for dtype in (torch.float64, torch.float32)
    }


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_sharded_int8) if kind == "int8" else kind for kind in KINDS]
)
def test_losses_equal_those_of_one_process(kind):
    found, again = run_in_two(losses_of_engines, kind)
    assert found == again
    exact = torch.tensor(train(patched(torch.float64, **KINDS[kind]), batch()), dtype=torch.float64)
    single = torch.tensor(train(patched(**KINDS[kind]), batch()))
    assert exact[-1] < exact[0] - 0.1
    for name in ENGINES:
        torch.testing.assert_close(
            torch.tensor(found[name, "torch.float64"], dtype=torch.float64), exact, rtol=HALF_THE_DIGITS, atol=0.0
        )
        assert_as_accurate_as_eager(torch.tensor(found[name, "torch.float32"]), single, exact, name)


# Memory


def resident_bytes():
    """This process' own memory, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def memory_of_int8(rank):
    """Bytes of int8 codes in this process and in all, and how much the process grew with them."""
    before = resident_bytes()
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(2048, 2048, bias=False)) for _ in range(8)])
    blocks.requires_grad_(False)
    fastlora.patch(blocks, r=2, targets="all-linear", quantize="int8")
    whole = resident_bytes() - before
    fastlora.shard(blocks, blocks=list(blocks))
    codes = [p for p in blocks.parameters() if p.dtype == torch.int8]
    here, all_of_it = sum(p.to_local().nbytes for p in codes), sum(p.nbytes for p in codes)
    return here, all_of_it, whole, resident_bytes() - before


@needs_sharded_int8
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process' memory from /proc")
def test_each_process_holds_half_of_the_int8_weights():
    for here, all_of_it, whole, sharded in run_in_two(memory_of_int8):
        assert all_of_it == 8 * 2048 * 2048
        assert here == all_of_it // PROCESSES
        # All of the codes were there, and half of them left.
        assert whole > all_of_it
        assert sharded < whole - 0.8 * here
