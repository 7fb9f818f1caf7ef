"""Fine-tunes a causal language model on instructions, with the Trainer of transformers.

    python examples/finetune.py MODEL DATA.jsonl OUT
    torchrun --nproc-per-node 8 examples/finetune.py MODEL DATA.jsonl OUT

Each line of the data is `{"prompt": ..., "completion": ...}`; the loss is that of the completions. The command goes on
from the last whole checkpoint when it is repeated. The adapter comes to `OUT/adapter`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import fastlora

HELD_OUT_EVERY = 10


def read_rows(file: Path, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Tokens of prompt, completion and end, with labels that leave the prompt out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        prompt = tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"]
        completion = tokenizer(pair["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids, labels = prompt + completion, [-100] * len(prompt) + completion
        rows.append({"input_ids": ids[:length], "labels": labels[:length]})
    return rows


def main(model_path: str, data: Path, out: Path, epochs: float, rate: float, length: int) -> None:
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16 if on_gpu else torch.float32)
    fastlora.patch(model, r=16, targets="all-linear", dropout=0.05, quantize="int8")
    fastlora.print_trainable_parameters(model)

    rows = read_rows(data, tokenizer, length)
    held_out = rows[::HELD_OUT_EVERY]
    arguments = TrainingArguments(
        str(out), num_train_epochs=epochs, learning_rate=rate, per_device_train_batch_size=4, bf16=on_gpu,
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=2, logging_steps=10, report_to=[],
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=[row for index, row in enumerate(rows) if index % HELD_OUT_EVERY], eval_dataset=held_out,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=fastlora.last_checkpoint(out))
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        fastlora.save(model, out / "adapter")
        print(f"held-out perplexity {math.exp(before):.2f} before, {math.exp(after):.2f} after")
        print(f"adapter in {out / 'adapter'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row at most")
    options = parser.parse_args()
    main(options.model, options.data, options.out, options.epochs, options.rate, options.length)
