"""Attention that calls its key and value before its query."""

import re
from pathlib import Path

import torch
import transformers
from torch import nn

import fastlora
from fastlora import ops
from fastlora.layers.families import QUERY_LAST

MODELS = Path(transformers.__file__).parent / "models"
CLASS = re.compile(r"^class (\w+)\(.*?(?=^class |\Z)", re.MULTILINE | re.DOTALL)


class DPTSelfAttention(nn.Module):
    """Named as one of transformers' that does."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        key, value = self.key(x), self.value(x)
        return self.query(x) * key + value


def test_one_op_computes_all_three(monkeypatch):
    made, op = [], ops.lora_linear_group
    monkeypatch.setattr(ops, "lora_linear_group", lambda x, ws, *rest: made.append(ws) or op(x, ws, *rest))
    model = nn.Sequential(DPTSelfAttention())
    fastlora.patch(model, r=2, targets=["query", "key", "value"], dropout=0.2)
    x = torch.randn(5, 12)
    model.train()(x)
    expected = [model[0].get_submodule(name).weight for name in ("key", "value", "query")]
    assert [[id(w) for w in ws] for ws in made] == [[id(w) for w in expected]]


def test_every_such_attention_of_transformers_is_known():
    found = set()
    for file in MODELS.glob("*/modeling_*.py"):
        for match in CLASS.finditer(file.read_text()):
            query, key, value = (match.group(0).find(f"= self.{name}(") for name in ("query", "key", "value"))
            if -1 < key < value < query:
                found.add(match.group(1))
    assert found
    assert found <= QUERY_LAST
