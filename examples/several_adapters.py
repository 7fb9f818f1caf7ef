"""Trains several adapters on one frozen model in one run, each on the rows that name it.

    python examples/several_adapters.py MODEL DATA.jsonl OUT

Each line of the data is `{"text": ..., "adapter": NAME}`. Every adapter gets the gradients that it would get alone with
its rows; the frozen model is computed once for all of them. They come to `OUT/NAME`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fastlora


def main(model_path: str, data: Path, out: Path, steps: int, rate: float) -> None:
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16 if on_gpu else torch.float32)

    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    names = sorted({line["adapter"] for line in lines})
    for name in names:
        fastlora.patch(model, r=8, targets="all-linear", adapter=name)
    rows = [{"input_ids": tokenizer(line["text"])["input_ids"], "adapter": line["adapter"]} for line in lines]

    arguments = TrainingArguments(
        str(out / "checkpoints"), max_steps=steps, per_device_train_batch_size=8, logging_steps=5, report_to=[],
        bf16=on_gpu, save_strategy="no",
        remove_unused_columns=False,  # keeps the column with the adapter
        max_grad_norm=0.0,  # one bound for all gradients would couple the adapters
    )  # fmt: skip
    optimizer = torch.optim.AdamW(fastlora.adapter_groups(model, dict.fromkeys(names, rate)))
    with fastlora.MixedTraining(model) as mixed:
        collate = mixed.collator(DataCollatorForLanguageModeling(tokenizer, mlm=False))
        trainer = Trainer(
            model, arguments, train_dataset=rows, data_collator=collate, compute_loss_func=mixed.loss,
            optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.train()
        for name, loss in mixed.losses.items():
            print(f"{name}: loss {loss:.3f} in its last batch")
    fastlora.save(model, out)
    print(f"adapters in {', '.join(str(out / name) for name in names)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-4)
    options = parser.parse_args()
    main(options.model, options.data, options.out, options.steps, options.rate)
