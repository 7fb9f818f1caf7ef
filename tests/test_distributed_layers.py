"""Every kind of layer under FSDP2. Two processes with the same rows compute what one computes."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import make_batch, make_model
from processes import run_in_two
from test_distributed import HALF_THE_DIGITS, optimizer_of
from torch import nn

import fastlora


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                                   num_key_value_heads=2, vocab_size=96, num_local_experts=4)
    )  # fmt: skip


class Attention(nn.Module):
    """A model of `nn.MultiheadAttention`, which reads its parameters itself."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(96, 48), nn.Linear(48, 96)
        self.blocks = nn.ModuleList([nn.MultiheadAttention(48, 4, batch_first=True) for _ in range(2)])

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = x + block(x, x, x)[0]
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(96, 48), nn.Linear(48, 96)
        self.blocks = nn.ModuleList([nn.Conv1d(48, 48, 3, padding=1) for _ in range(2)])

    def forward(self, input_ids):
        x = self.embedding(input_ids).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x.transpose(1, 2)))


CASES = {
    "trainable tokens of tied ends": (
        lambda: make_model("gpt2"), dict(target_modules=["c_attn"], trainable_token_indices=[3, 5])
    ),
    "tied embedding": (lambda: make_model("gpt2"), dict(target_modules=["wte", "c_attn"])),
    "embedding": (lambda: make_model("llama"), dict(target_modules=["embed_tokens"])),
    "experts": (mixtral, dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])),
    "attention": (Attention, dict(target_modules=["blocks.0", "blocks.1"])),
    # In float32 the order of a convolution's sums depends on where in memory its weight begins.
    "convolutions": (lambda: Convolutions().double(), dict(target_modules=["blocks.0", "blocks.1"])),
    "norms": (lambda: make_model("llama"), dict(target_modules=["q_proj"], modules_to_save=["norm"])),
    "biases": (lambda: make_model("gpt2"), dict(target_modules=["c_attn"], bias="all", lora_bias=True)),
}  # fmt: skip


def losses(model, inputs):
    optimizer, found = optimizer_of(model), []
    for _ in range(3):
        logits = model(input_ids=inputs["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def losses_of_cases(rank):
    """In two processes and in one; with adapters that are not zero, so that weights read with them differ."""
    found = {}
    for name, (make, settings) in CASES.items():
        torch.manual_seed(0)
        model = fastlora.patch(make(), config=fastlora.LoraConfig(r=4, **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.05)
        alone = copy.deepcopy(model)
        fastlora.shard(model, blocks=getattr(model, "blocks", None))
        found[name] = losses(model, make_batch()), losses(alone, make_batch())
    return found


def test_layers():
    for found in run_in_two(losses_of_cases):
        assert found.keys() == CASES.keys()
        for name, (sharded, alone) in found.items():
            assert sharded == pytest.approx(alone, rel=HALF_THE_DIGITS), name  # in float32, every bit
            assert alone[-1] < alone[0], name
