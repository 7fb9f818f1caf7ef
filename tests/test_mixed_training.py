"""Several adapters trained in one run: each gets what it would get alone, by itself and under the Trainer."""

import copy

import peft
import pytest
import torch
from mixed_batches import NAMES, collate, data, losses_by_row, patched
from models import make_model
from safetensors.torch import load_file
from transformers import DefaultDataCollator, Trainer, TrainingArguments

import fastlora
from fastlora.adapters.mixed_training import ROWS

RATES = {"a": 1e-2, "b": 3e-3, "c": 2e-2}
HALF_THE_DIGITS = torch.finfo(torch.float64).eps ** 0.5


def adapter_of(model, name):
    return {key: p for key, p in model.named_parameters() if key.endswith(f".{name}")}


def train_mixed(model, rows, steps, rates):
    """A loop in which each adapter's loss is the mean over its own rows."""
    optimizer = torch.optim.AdamW(fastlora.adapter_groups(model, rates, weight_decay=0.1))
    with fastlora.MixedTraining(model) as mixed:
        batch = mixed.collator(collate)(data(rows))
        index = batch[ROWS]
        for _ in range(steps):
            of_rows = losses_by_row(model, batch)
            loss = sum(of_rows[index == i].mean() for i in range(len(mixed.names)) if (index == i).any())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def train_alone(model, name, rows, steps):
    fastlora.set_adapter(model, name)
    optimizer = torch.optim.AdamW(adapter_of(model, name).values(), lr=RATES[name], weight_decay=0.1)
    batch = collate([row for row in data(rows) if row["adapter"] == name])
    for _ in range(steps):
        losses_by_row(model, batch).mean().backward()
        optimizer.step()
        model.zero_grad()


def assert_same_adapter(found, expected, name, **tolerance):
    expected = adapter_of(expected, name)
    assert expected
    for key, parameter in adapter_of(found, name).items():
        torch.testing.assert_close(parameter, expected[key], **tolerance)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_each_adapter_trains_as_alone(quantize):
    rows = ["b", "a", None, "c", "b"]
    model = patched(quantize=quantize)
    before, alone = copy.deepcopy(model), {name: copy.deepcopy(model) for name in NAMES}
    train_mixed(model, rows, 5, RATES)
    for name in NAMES:
        train_alone(alone[name], name, rows, 5)
        assert_same_adapter(model, alone[name], name, rtol=HALF_THE_DIGITS, atol=HALF_THE_DIGITS)
        assert any(not torch.equal(p, adapter_of(before, name)[key]) for key, p in adapter_of(model, name).items())


def gradients(model, rows):
    """Of the sum over rows, with the masks that follow from one seed."""
    torch.manual_seed(7)
    with fastlora.MixedTraining(model) as mixed:
        losses_by_row(model, mixed.collator(collate)(data(rows))).sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_dropout_masks_belong_to_the_places_of_rows():
    """With one seed, an adapter gets the gradients that it gets where the other rows have none, bit for bit."""
    model = patched(dropout=0.3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    together = gradients(model, ["a", "b", "b", "a"])
    for name, rows in (("a", ["a", None, None, "a"]), ("b", [None, "b", "b", None])):
        for key, gradient in gradients(model, rows).items():
            assert key.endswith(f".{name}")
            torch.testing.assert_close(gradient, together[key], rtol=HALF_THE_DIGITS, atol=HALF_THE_DIGITS)
    elsewhere = gradients(model, ["b", "b", "a", "a"])
    assert not torch.allclose(*(g[next(iter(adapter_of(model, "a")))] for g in (together, elsewhere)))


def test_an_adapter_without_rows_is_left_alone():
    """Its parameters, in spite of weight decay and of the optimizer's momentum."""
    model = patched()
    train_mixed(model, ["a", "b"], 2, RATES)
    assert all(p.grad is None for p in adapter_of(model, "c").values())
    expected = patched()
    assert_same_adapter(model, expected, "c", rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_with_the_mix(reentrant):
    """Until the next call, that is in the backward too."""
    rows = ["a", None, "b", "b"]
    model = patched("llama", torch.float32, dropout=0.3)
    expected = gradients(model, rows)
    fastlora.prepare_for_training(model, checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, rows)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# The Trainer


def trainer_for(model, rows, folder, mixed=None, rates=RATES, **settings):
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=6, num_train_epochs=4, report_to=[], save_strategy="no", max_grad_norm=0.0,
        remove_unused_columns=False, use_cpu=True, disable_tqdm=True, logging_steps=1,
        lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    dataset = data(rows)
    if mixed is None:
        for row in dataset:
            del row["adapter"]
        groups = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(groups, lr=next(iter(rates.values())))
        return Trainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, None))
    optimizer = torch.optim.SGD(fastlora.adapter_groups(model, rates))
    return Trainer(
        model, arguments, train_dataset=dataset, data_collator=mixed.collator(DefaultDataCollator()),
        compute_loss_func=mixed.loss, optimizers=(optimizer, None),
    )  # fmt: skip


def test_the_trainer_trains_each_adapter_as_alone(tmp_path):
    """With plain SGD, which shows the scale of a gradient that Adam would hide."""
    rows, rates = ["a", "b", "a", "b", "b", "b"], {"a": 0.5, "b": 1.0}
    model = patched(dtype=torch.float32, names=["a", "b"])
    exact, alone = copy.deepcopy(model).double(), {name: copy.deepcopy(model) for name in rates}
    with fastlora.MixedTraining(model) as mixed:
        trainer = trainer_for(model, rows, tmp_path, mixed, rates)
        trainer.train()
        assert mixed.losses.keys() == {"a", "b"}
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    for name, rate in rates.items():
        fastlora.set_adapter(alone[name], name)
        for other in rates.keys() - {name}:
            fastlora.delete_adapter(alone[name], other)
        own = [row for row in data(rows) if row["adapter"] == name]
        trainer_for_rows = trainer_for(alone[name], rows, tmp_path, rates={name: rate})
        trainer_for_rows.train_dataset = [{k: v for k, v in row.items() if k != "adapter"} for row in own]
        trainer_for_rows.train()
        step = max((p - exact.get_parameter(key)).abs().max() for key, p in adapter_of(alone[name], name).items())
        # Four steps, whose gradients are sums of float32 products in another order.
        assert_same_adapter(model, alone[name], name, rtol=0, atol=1e-4 * step.item())
    fastlora.save(model, tmp_path / "adapters")
    for name in rates:
        saved = load_file(tmp_path / "adapters" / name / "adapter_model.safetensors")
        assert len(saved) == len(adapter_of(model, name))
    peft.PeftModel.from_pretrained(make_model("gpt2"), tmp_path / "adapters" / "a")
