"""Tiny models, data and trainers for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import VOCABULARY, make_model
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

TARGETS = ["q_proj", "v_proj", "down_proj"]


def saved_base(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A model loaded from a folder, which checkpoints can name as their base."""
    make_model(name, dtype).save_pretrained(folder)
    model: Any = type(make_model(name))
    return model.from_pretrained(folder, dtype=dtype)


def rows(count: int = 32, length: int = 12) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCABULARY, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(model: nn.Module, folder: Path, kind: type = Trainer, data: Any = None, **settings: Any) -> Any:
    """A quiet Trainer of six steps with a checkpoint after the third and the last."""
    extra = {name: settings.pop(name) for name in ("eval_dataset", "callbacks", "data_collator") if name in settings}
    arguments: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=6, save_steps=3, logging_steps=1,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    arguments_class = settings.pop("arguments_class", TrainingArguments)
    trainer = kind(model=model, args=arguments_class(**arguments | settings), train_dataset=data or rows(), **extra)
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: Any) -> dict[int, float]:
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.tensor([row["input_ids"] for row in rows(2)])
    return model.eval()(input_ids=ids).logits
