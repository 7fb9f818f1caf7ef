"""The transformers Trainer of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

import fastlora

from .progress import Display
from .sequences import Collator

if TYPE_CHECKING:
    from .run import Prepared


def make_trainer(prepared: Prepared, console: Console) -> tuple[Trainer, nn.Module]:
    """Loads and patches the model, and makes a Trainer of it; the adapter depends on the seed alone. Returns both."""
    settings = prepared.settings
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=prepared.dtype)
    torch.manual_seed(settings.training.seed)
    fastlora.patch(model, config=prepared.lora, quantize=settings.lora.quantize, compute=settings.lora.compute)
    model.config.use_cache = False
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(prepared)),
        train_dataset=prepared.rows,  # type: ignore[arg-type]
        eval_dataset=prepared.held_out or None,  # type: ignore[arg-type]
        data_collator=Collator(prepared.tokenizer.pad_token_id or 0),  # any token will do, as padding is masked
        callbacks=[Display(console)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, model


def arguments(prepared: Prepared) -> dict[str, Any]:
    """The Trainer's arguments."""
    chosen = prepared.settings.training
    checkpointing = {"none": None, "reentrant": True, "non-reentrant": False}[chosen.checkpointing]
    evaluation = "no" if not prepared.held_out else "steps" if chosen.eval_every else "epoch"
    return dict(
        output_dir=str(prepared.settings.out),
        num_train_epochs=chosen.epochs,
        max_steps=chosen.max_steps or -1,
        per_device_train_batch_size=chosen.batch_size,
        per_device_eval_batch_size=chosen.batch_size,
        gradient_accumulation_steps=chosen.accumulation,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.schedule,
        warmup_steps=chosen.warmup_steps,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.clip,
        optim=chosen.optimizer,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=None if checkpointing is None else {"use_reentrant": checkpointing},
        torch_compile=chosen.compile,
        seed=chosen.seed,
        bf16=prepared.dtype == torch.bfloat16,
        fp16=prepared.dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=chosen.log_every,
        save_strategy="steps" if chosen.save_every else "epoch",
        save_steps=chosen.save_every or 500,
        save_total_limit=chosen.keep,
        eval_strategy=evaluation,
        eval_steps=chosen.eval_every,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
