"""Training with transformers' Trainer: checkpoints, resuming, and what else the Trainer offers."""

import shutil

import peft
import pytest
import torch
import transformers
from models import make_model
from safetensors.torch import load_file
from training import TARGETS, assert_same, logits, losses, make_trainer, rows, saved_base, trained
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments

import fastlora

# transformers renames its settings from release to release; the old names work in all of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")

CONFIGS = {
    "plain": dict(),
    "dora": dict(use_dora=True),
    "modules": dict(modules_to_save=["lm_head"]),
    "biases": dict(bias="all", lora_bias=True),
    "tokens": dict(trainable_token_indices=[3, 5]),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "pissa": dict(init_lora_weights="pissa"),
}


def patched(model, seed=0, adapter="default", quantize=None, **settings):
    torch.manual_seed(seed)
    config = fastlora.LoraConfig(**dict(r=4, target_modules=TARGETS, lora_dropout=0.1) | settings)
    return fastlora.patch(model, config=config, adapter=adapter, quantize=quantize)


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_resumes_to_the_bit(settings, tmp_path, caplog):
    """Everything that trains is in the checkpoint, and nothing else."""
    name = "qwen2" if "bias" in settings else "llama"
    straight, resumed = (patched(make_model(name), seed, **settings) for seed in (1, 2))
    first = make_trainer(straight, tmp_path / "first")
    first.train()
    state = load_file(tmp_path / "first" / "checkpoint-3" / "model.safetensors")
    assert state.keys() == trained(straight).keys()
    second = make_trainer(resumed, tmp_path / "second")
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    assert losses(second) == losses(first)
    assert_same(trained(resumed), trained(straight))
    assert "missing keys" not in caplog.text


def test_resumes_from_the_last_whole_checkpoint(tmp_path):
    straight = patched(make_model("llama"))
    make_trainer(straight, tmp_path).train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": 6, ')
    last = fastlora.last_checkpoint(tmp_path)
    assert last == str(tmp_path / "checkpoint-3")
    resumed = patched(make_model("llama"), seed=9)
    make_trainer(resumed, tmp_path).train(resume_from_checkpoint=last)
    assert_same(trained(resumed), trained(straight))
    assert fastlora.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_checkpoint_is_an_adapter_folder(tmp_path):
    model = patched(saved_base(tmp_path / "base"), quantize=None)
    make_trainer(model, tmp_path / "out").train()
    folder = tmp_path / "out" / "checkpoint-6"
    assert not (folder / "config.json").exists()
    expected = logits(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    of_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    own = fastlora.load(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    assert torch.equal(logits(own), expected)
    assert torch.equal(logits(loaded), logits(of_peft))
    torch.testing.assert_close(logits(loaded), expected)


def test_loads_the_best_and_stops_early(tmp_path):
    """The rate is so high that the loss rises, so that the best checkpoint is an early one."""
    model = patched(make_model("llama"))
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(
        model, tmp_path, eval_dataset=rows(4), callbacks=[stop], learning_rate=30.0, max_steps=12, save_steps=2,
        eval_steps=2, eval_strategy="steps", load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert trainer.state.global_step < 12
    assert best is not None
    assert best != str(tmp_path / f"checkpoint-{trainer.state.global_step}")
    assert_same(trained(model), load_file(f"{best}/model.safetensors"))
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


@pytest.mark.parametrize(
    "settings",
    [
        dict(gradient_accumulation_steps=2),
        dict(train_sampling_strategy="group_by_length", per_device_train_batch_size=1),
        dict(bf16=True),
        dict(num_train_epochs=2, max_steps=-1, save_strategy="epoch", per_device_train_batch_size=8),
    ],
    ids=["accumulation", "length-grouping", "bf16", "epochs"],
)
def test_resumes_with_settings_of_the_trainer(settings, tmp_path):
    data = [{name: value[: 6 + index % 7] for name, value in row.items()} for index, row in enumerate(rows())]
    if "train_sampling_strategy" not in settings:
        data = rows()
    straight, resumed = patched(make_model("llama"), seed=1), patched(make_model("llama"), seed=2)
    first = make_trainer(straight, tmp_path, data=data, **settings)
    first.train()
    checkpoint = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert checkpoint.name != f"checkpoint-{first.state.global_step}"
    second = make_trainer(resumed, tmp_path, data=data, **settings)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert losses(second) == losses(first)
    assert_same(trained(resumed), trained(straight))


def test_generates_during_evaluation(tmp_path):
    model = patched(make_model("t5"), target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    trainer = make_trainer(
        model, tmp_path, kind=Seq2SeqTrainer, arguments_class=Seq2SeqTrainingArguments, eval_dataset=rows(4),
        eval_strategy="steps", eval_steps=3, predict_with_generate=True,
    )  # fmt: skip
    generated = []
    trainer.compute_metrics = lambda outcome: generated.append(outcome.predictions) or {"count": 1}
    trainer.train()
    assert [(found.ndim, len(found), found.dtype.kind) for found in generated] == [(2, 4, "i"), (2, 4, "i")]


@needs_compiler
def test_compiles_with_inductor(tmp_path):
    losses_by_mode = []
    for compiled in (False, True):
        model = patched(make_model("llama"), quantize="int8", lora_dropout=0.0)
        trainer = make_trainer(model, tmp_path, max_steps=3, torch_compile=compiled)
        trainer.train()
        losses_by_mode.append(list(losses(trainer).values()))
    eager, compiled = losses_by_mode
    assert compiled == pytest.approx(eager, abs=1e-3)
    assert fastlora.last_checkpoint(tmp_path) is not None


def test_moving_statistics_are_in_the_checkpoint(tmp_path):
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    pixels = torch.randn(24, 3, 16, 16)
    data = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(pixels)]
    runs = []
    for seed, resume in ((1, None), (2, str(tmp_path / "checkpoint-3"))):
        torch.manual_seed(0)
        model = transformers.ResNetForImageClassification(config)
        model = patched(model, seed, target_modules=["convolution"], lora_dropout=0.0)
        make_trainer(model, tmp_path, data=data).train(resume_from_checkpoint=resume)
        runs.append(trained(model) | {name: b for name, b in model.named_buffers() if "running" in name})
    assert_same(runs[1], runs[0])
    assert any("running" in name for name in runs[0])


def test_checkpoint_of_another_adapter_is_refused(tmp_path):
    make_trainer(patched(make_model("llama"), adapter="other"), tmp_path).train()
    model = patched(make_model("llama"))
    before = trained(model)
    with pytest.raises(ValueError, match=r"adapters \['default'\], found '.*\.lora_\w\.other'"):
        make_trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(trained(model), before)


def test_checkpoint_of_another_rank_is_refused(tmp_path):
    make_trainer(patched(make_model("llama")), tmp_path).train()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_trainer(patched(make_model("llama"), r=2), tmp_path).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )
