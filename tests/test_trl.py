"""Training with TRL: SFTTrainer with packing, and DPOTrainer with the model as its own reference."""

import math

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from training import TARGETS, assert_same, losses, make_trainer, trained
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import fastlora
from fastlora.quickstart.demo import BASE

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def make_llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def patched(tokenizer, seed=0, **settings):
    model = make_llama(tokenizer)
    torch.manual_seed(seed)
    return fastlora.patch(model, **dict(r=4, targets=TARGETS) | settings)


def sft(model, tokenizer, folder, **settings):
    texts = [{"text": f"{i} squared is {i * i}."} for i in range(40)]
    settings = dict(bf16=False, gradient_checkpointing=False, max_length=32) | settings
    trainer = make_trainer(
        model, folder, kind=lambda **given: SFTTrainer(processing_class=tokenizer, **given),
        arguments_class=SFTConfig, data=Dataset.from_list(texts), **settings,
    )  # fmt: skip
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_sft_with_packing_resumes_to_the_bit(checkpointing, tokenizer, tmp_path):
    settings = dict(packing=True, packing_strategy="wrapped", gradient_checkpointing=checkpointing)
    runs = []
    for seed, resume in ((1, None), (2, str(tmp_path / "checkpoint-3"))):
        model = patched(tokenizer, seed, dropout=0.1, quantize="int8")
        trainer = sft(model, tokenizer, tmp_path, **settings)
        assert {len(row) for row in trainer.train_dataset["input_ids"][:-1]} == {32}
        trainer.train(resume_from_checkpoint=resume)
        runs.append((losses(trainer), trained(model)))
    (straight, weights), (resumed, resumed_weights) = runs
    assert straight == resumed
    assert straight[6] < straight[1]
    assert_same(resumed_weights, weights)


def test_sft_refuses_an_adapter_on_the_head(tokenizer, tmp_path):
    model = patched(tokenizer, targets=["q_proj", "lm_head"], allow_output_head=True)
    before = trained(model)
    with pytest.raises(ValueError, match="targets: expected no output head under this trainer"):
        sft(model, tokenizer, tmp_path).train()
    assert_same(trained(model), before)


def test_trainer_takes_an_adapter_on_the_head(tokenizer, tmp_path):
    model = patched(tokenizer, targets=["lm_head"], allow_output_head=True)
    before = trained(model)
    make_trainer(model, tmp_path).train()
    assert not torch.equal(trained(model)["lm_head.lora_B.default"], before["lm_head.lora_B.default"])


@pytest.mark.parametrize("settings", [dict(modules_to_save=["lm_head"]), dict(trainable_token_indices=[40, 41])],
                         ids=["module", "tokens"])  # fmt: skip
def test_sft_trains_the_head_in_other_ways(settings, tokenizer, tmp_path):
    model = make_llama(tokenizer)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    fastlora.patch(model, config=fastlora.LoraConfig(r=4, target_modules=["q_proj"], **settings))
    before = trained(model)
    sft(model, tokenizer, tmp_path).train()
    for name, value in trained(model).items():
        assert not torch.equal(value, before[name]) or name.endswith("lora_A.default"), name


def preferences():
    pairs = [(f"{i} is ", "even" if i % 2 == 0 else "odd", "neither") for i in range(12)]
    return Dataset.from_list([{"prompt": prompt, "chosen": yes, "rejected": no} for prompt, yes, no in pairs])


def dpo(model, tokenizer, folder, **settings):
    settings = dict(bf16=False, gradient_checkpointing=False, max_length=32, learning_rate=3e-2) | settings
    return make_trainer(
        model, folder, kind=lambda **given: DPOTrainer(processing_class=tokenizer, **given),
        arguments_class=DPOConfig, data=preferences(), **settings,
    )  # fmt: skip


def test_dpo_with_the_model_as_its_own_reference(tokenizer, tmp_path):
    """Its log-probabilities of before the training, computed once, are those of the model without its adapter."""
    model = patched(tokenizer)
    trainer = dpo(model, tokenizer, tmp_path, precompute_ref_log_probs=True)
    with fastlora.disabled(model):
        frozen = dpo(model, tokenizer, tmp_path, precompute_ref_log_probs=True)
    name = next(column for column in trainer.train_dataset.column_names if column.startswith("ref_"))
    assert trainer.train_dataset[name] == frozen.train_dataset[name]
    trainer.train()
    found = losses(trainer)
    assert found[1] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference agree before the first step
    assert found[6] < found[1]
    state = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert_same(state, trained(model))


def test_dpo_with_a_peft_model(tokenizer, tmp_path):
    """TRL gives a PeftModel a second, frozen adapter as its reference, which runs on the same ops."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = fastlora.patch(peft.get_peft_model(make_llama(tokenizer), settings))
    trainer = dpo(model, tokenizer, tmp_path)
    trainer.train()
    found = losses(trainer)
    assert found[1] == pytest.approx(math.log(2), abs=1e-4)
    assert found[6] < found[1]
    assert not [name for name, p in model.named_parameters() if ".ref." in name and p.requires_grad]
