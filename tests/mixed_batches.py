"""Models with several adapters, and rows of data that name one each."""

import torch
import torch.nn.functional as F
from models import MODELS, make_batch, make_model

import fastlora
from fastlora.adapters.mixed_training import ROWS

NAMES = ["a", "b", "c"]


def patched(name="gpt2", dtype=torch.float64, dropout=0.0, names=NAMES, quantize=None):
    """GPT-2 computes all of itself in float64."""
    model = make_model(name)
    for i, adapter in enumerate(names):
        config = fastlora.LoraConfig(r=2 + i, target_modules=MODELS[name][1], lora_dropout=dropout)
        fastlora.patch(model, config=config, adapter=adapter, quantize=quantize)
    return model.to(dtype).train()


def data(rows):
    """A row of data per name."""
    ids = make_batch(batch=len(rows))["input_ids"]
    return [{"input_ids": row, "labels": row.clone(), "adapter": name} for row, name in zip(ids, rows, strict=True)]


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def losses_by_row(model, batch):
    """The mean over the tokens of each row, in the model's dtype."""
    logits = model(input_ids=batch["input_ids"], **{ROWS: batch[ROWS]} if ROWS in batch else {}).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").mean(dim=1)
