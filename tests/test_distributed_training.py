"""What people combine with DDP and FSDP2: 16 bits, checkpointing, dropout, a compiler, mixed batches, ZeRO."""

import copy

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from mixed_batches import NAMES, collate, data, losses_by_row
from mixed_batches import patched as with_adapters
from models import MODELS, make_model
from processes import INT8, needs_sharded_int8, run_in_two
from test_distributed import ENGINES, HALF_THE_DIGITS, batch, ddp, loss_of, patched, train
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import fastlora

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def filled(model):
    """The same values, none of them zero, in the adapters of every process."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def whole_gradients(model):
    """The gradient of each parameter that trains, whole."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def close(found, expected):
    return all(torch.allclose(found[name], expected[name], rtol=HALF_THE_DIGITS, atol=HALF_THE_DIGITS)
               for name in expected.keys() | found.keys())  # fmt: skip


# 16 bits


def error_in_bf16(rank, quantize):
    """Holds the gradients of float32 masters, sharded and gathered as bfloat16, to those of a bfloat16 model.

    The policy rounds the scales of int8 weights too, and the model's are float32.
    """
    model = filled(patched(quantize=quantize))
    eager, exact = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double()
    for name, parameter in model.named_parameters():
        if name.endswith("weight_scale"):
            eager.get_parameter(name).data = parameter.data
    fastlora.shard(model, mp_policy=BF16)
    loss_of(model, batch(rank)).backward()
    for other in (eager, exact):
        loss_of(other, batch()).backward()
    found, eager, exact = (torch.cat([g.flatten() for g in whole_gradients(m).values()]) for m in (model, eager, exact))
    assert_as_accurate_as_eager(found, eager.float(), exact, "gradients")


@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=needs_sharded_int8)])
def test_mixed_precision_is_as_accurate_as_a_16_bit_model(quantize):
    run_in_two(error_in_bf16, quantize)


# Dropout and checkpointing


def gradients_of_seed(model, seed, inputs):
    torch.manual_seed(seed)
    model.zero_grad()
    loss_of(model, inputs).backward()
    return whole_gradients(model)


def masks(rank):
    """Whether the processes draw one mask with one seed, and two with two; and whether a recomputation repeats it."""
    model = filled(patched(name="llama", dropout=0.4, quantize=INT8).train())
    losses = []
    for seed in (7, 7 + rank):
        torch.manual_seed(seed)
        losses.append(loss_of(model, batch()).item())
    fastlora.shard(model)
    expected = gradients_of_seed(model, 7 + rank, batch(rank))
    exact = []
    for reentrant in (False, True):
        fastlora.prepare_for_training(model, checkpointing_kwargs={"use_reentrant": reentrant})
        found = gradients_of_seed(model, 7 + rank, batch(rank))
        exact.append(found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found))
    return losses, exact


def test_masks_follow_from_the_seed_of_a_process():
    (losses, exact), (others, exact_too) = run_in_two(masks)
    assert losses[0] == others[0]
    assert losses[1] != others[1]
    assert exact == exact_too == [True, True]


# A compiler


def compiled_losses(rank):
    found = []
    for compiles in (False, True):
        model = patched(torch.float64, quantize=INT8)
        del model.transformer.h[1:]  # a compiler takes as long for each layer
        fastlora.shard(model)
        if compiles:
            model.compile(backend="aot_eager")
        found.append(train(model, batch(rank), steps=3))
    return found


def test_a_sharded_model_compiles():
    for eager, compiled in run_in_two(compiled_losses):
        assert compiled == pytest.approx(eager, rel=HALF_THE_DIGITS)


# PEFT


def peft_losses(rank):
    """A PeftModel that runs on fastlora's ops, whole and sharded as accelerate does it."""
    import peft  # which takes seconds, in the one function that needs it

    config = peft.LoraConfig(r=4, target_modules=MODELS["gpt2"][1], fan_in_fan_out=True)
    whole = fastlora.patch(peft.get_peft_model(make_model("gpt2"), config)).double()
    model = copy.deepcopy(whole)
    for block in model.base_model.model.transformer.h:
        fully_shard(block)
    found = train(fully_shard(model), batch(rank), steps=3)
    expected = train(whole, batch(), steps=3)
    return found, expected


def test_a_model_of_peft_is_sharded():
    for found, expected in run_in_two(peft_losses):
        assert found == pytest.approx(expected, rel=HALF_THE_DIGITS)


# Several adapters


def mixed_gradients(rank, engine):
    """Whether the gradients of a batch in two parts, with other adapters in each, are those of the whole."""
    rows = ["b", None, "a", "a"]
    model = filled(with_adapters())
    alone = copy.deepcopy(model)
    wrapper = ENGINES[engine](model)
    with fastlora.MixedTraining(model) as mixed:
        own = mixed.collator(collate)(data(rows)[2 * rank : 2 * rank + 2])
        losses_by_row(wrapper, own).mean().backward()
    found = {name: g for name, g in whole_gradients(model).items() if not name.endswith(f".{NAMES[2]}")}
    with fastlora.mixed(alone, rows):
        loss_of(alone, collate(data(rows))).backward()
    expected = whole_gradients(alone)
    return found.keys() == expected.keys() and close(found, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_processes_may_have_rows_of_different_adapters(engine):
    assert run_in_two(mixed_gradients, engine) == [True, True]


# Other optimizers


def zero1_losses(rank):
    """DDP with the optimizer's state in one process and in parts."""
    whole = patched()
    expected = train(ddp(whole), batch(rank), steps=5)
    parts = patched()
    parameters = [p for p in parts.parameters() if p.requires_grad]
    optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2)
    found = train(ddp(parts), batch(rank), steps=5, optimizer=optimizer)
    held = sum(len(state) > 0 for state in optimizer.optim.state.values())
    same = all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))
    return found == expected, same, held, len(parameters)


def test_state_of_the_optimizer_in_parts():
    """PyTorch's ZeRO stage 1."""
    (*equal, held, count), (*equal_too, held_too, _) = run_in_two(zero1_losses)
    assert equal == equal_too == [True, True]
    assert held + held_too == count
    assert max(held, held_too) < count
