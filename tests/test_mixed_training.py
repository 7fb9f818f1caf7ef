"""Several adapters trained in one run: each gets what it would get alone, by itself and under the Trainer."""

import copy
import pickle

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from mixed_batches import NAMES, collate, data, losses_by_row, patched
from models import make_model
from safetensors.torch import load_file
from transformers import DefaultDataCollator, Trainer, TrainingArguments

import fastlora
from fastlora.adapters.mixed_training import ROWS
from fastlora.adapters.registry import adapters

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


def trainer_for(model, rows, folder, groups, **settings):
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=6, num_train_epochs=4, report_to=[], save_strategy="no", max_grad_norm=0.0,
        remove_unused_columns=False, use_cpu=True, disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    # Plain SGD shows the scale of a gradient, which Adam would hide.
    return Trainer(model, arguments, train_dataset=rows, optimizers=(torch.optim.SGD(groups), None), **settings)


def train_alone_by_trainer(model, name, rows, rate, folder):
    for other in set(adapters(model)) - {name}:
        fastlora.delete_adapter(model, other)
    own = [{key: row[key] for key in ("input_ids", "labels")} for row in rows if row["adapter"] == name]
    trainer_for(model, own, folder, [{"params": adapter_of(model, name).values(), "lr": rate}]).train()
    return adapter_of(model, name)


def test_the_trainer_trains_each_adapter_as_alone(tmp_path):
    rows, rates = data(["a", "b", "a", "b", "b", "b"]), {"a": 0.5, "b": 1.0}
    model = patched(dtype=torch.float32, names=["a", "b"])
    start = copy.deepcopy(model)
    with fastlora.MixedTraining(model) as mixed:
        trainer = trainer_for(
            model, rows, tmp_path, fastlora.adapter_groups(model, rates), compute_loss_func=mixed.loss,
            data_collator=mixed.collator(DefaultDataCollator()),
        )  # fmt: skip
        trainer.train()
        assert mixed.losses.keys() == {"a", "b"}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    for name, rate in rates.items():
        alone = train_alone_by_trainer(copy.deepcopy(start), name, rows, rate, tmp_path)
        exact = train_alone_by_trainer(copy.deepcopy(start).double(), name, rows, rate, tmp_path)
        for key, parameter in adapter_of(model, name).items():
            assert_as_accurate_as_eager(parameter, alone[key], exact[key], key)
            assert not torch.equal(parameter, start.get_parameter(key))


def test_adapters_are_saved_apart(tmp_path):
    model = patched(dtype=torch.float32, names=["a", "b"])
    fastlora.save(model, tmp_path)
    for name in ("a", "b"):
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        found = {f"base_model.model.{key.removesuffix(name)}weight": p for key, p in adapter_of(model, name).items()}
        assert saved.keys() == found.keys()
        assert all(torch.equal(saved[key], found[key]) for key in saved)


# Rates


def test_adapter_groups_hold_what_trains_of_each():
    model = make_model("llama")
    fastlora.patch(model, config=fastlora.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), adapter="a")
    fastlora.patch(model, r=2, targets=["v_proj"], adapter="b")
    fastlora.freeze_a(model, "b")
    fastlora.set_adapter(model, "a")  # whose norms stand in the model then
    names = {id(p): name for name, p in model.named_parameters()}
    groups = fastlora.adapter_groups(model, {"a": 0.1, "b": 0.2}, weight_decay=0.5)
    found = {names[id(p)]: (g["adapter"], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    layers = [f"model.layers.{i}.self_attn" for i in range(2)]
    assert found == {
        **{f"{layer}.q_proj.lora_{part}.a": ("a", 0.1, 0.5) for layer in layers for part in "AB"},
        **{f"{layer}.v_proj.lora_B.b": ("b", 0.2, 0.5) for layer in layers},
        **{name: ("a", 0.1, 0.0) for name in names.values() if "norm" in name},
    }
    torch.optim.AdamW(groups)


def frozen_a(model):
    for parameter in adapter_of(model, "a").values():
        parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("prepare", "rates", "message"),
    [
        (None, {"a": 0.1, "b": 0.1}, r"expected one for each adapter that trains, found none for \['c'\]"),
        (None, {"a": 0.1, "b": 0.1, "c": 0.1, "z": 0.1}, "found 'z'"),
        (None, {"a": -0.1, "b": 0.1, "c": 0.1}, "a: expected a number of at least 0, found -0.1"),
        (frozen_a, {"a": 0.1, "b": 0.1, "c": 0.1}, "expected adapters that train, found 'a', which is frozen"),
    ],
)
def test_adapter_groups_refuse(prepare, rates, message):
    model = patched()
    if prepare:
        prepare(model)
    with pytest.raises(ValueError, match=message):
        fastlora.adapter_groups(model, rates)


# Batches


def test_the_collator_goes_to_other_processes():
    collator = fastlora.MixedTraining(patched(), names=["c", "a"]).collator(collate)
    batch = pickle.loads(pickle.dumps(collator))(data(["a", None, "c"]))
    assert batch[ROWS].tolist() == [1, -1, 0]
    assert batch.keys() == {"input_ids", "labels", ROWS}


def test_a_batch_that_names_no_adapters_uses_the_active_one():
    model, batch = patched().eval(), collate(data(["a", "b"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    active = losses_by_row(model, batch)
    with fastlora.MixedTraining(model) as mixed:
        assert not torch.equal(losses_by_row(model, mixed.collator(collate)(data(["a", "b"]))), active)
        assert torch.equal(losses_by_row(model, batch), active)
        with pytest.raises(ValueError, match="adapter_rows: expected in the batch"):
            mixed.loss({"logits": torch.zeros(2, 3, 4)}, torch.zeros(2, 3))
        losses_by_row(model, mixed.collator(collate)(data([None])))
        with pytest.raises(ValueError, match="adapter: expected a row in each batch that names an adapter"):
            mixed.loss({"logits": torch.zeros(1, 3, 4)}, torch.zeros(1, 3))
        losses_by_row(model, mixed.collator(collate)(data(["a", "b"])))
    assert torch.equal(losses_by_row(model, batch), active)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": torch.ones(2)}], r"expected 'adapter' in every row, found \['input_ids'\]; .*Trainer keeps"),
        (data(["a", "z"]), r"adapter: expected one of \['a', 'b', 'c'\] or None, found 'z'"),
    ],
)
def test_rows_are_refused(rows, message):
    collator = fastlora.MixedTraining(patched()).collator(collate)
    with pytest.raises(ValueError, match=message):
        collator(rows)


def test_refuses_unknown_adapters():
    with pytest.raises(ValueError, match="found 'z'"):
        fastlora.MixedTraining(patched(), names=["a", "z"])
    with pytest.raises(ValueError, match="expected one that was patched"):
        fastlora.MixedTraining(make_model("gpt2"))
