"""Makes the embedded base model: a byte-level Llama pretrained on the Python standard library's source.

    python -m fastlora.quickstart.pretrain OUT --seconds 900

The documentation that the quickstart adapts to (`pydoc_data`) is left out, so it stays unseen.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

SEQUENCE = 256
BATCH = 16
PEAK_LR = 4e-3
LEFT_OUT = ("site-packages", "pydoc_data", "test", "tests", "idlelib", "turtledemo", "lib2to3")


def base_config(tokenizer: ByT5Tokenizer) -> LlamaConfig:
    """0.46 M parameters: under 1 MB in bf16."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=240,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def standard_library_source() -> str:
    root = Path(sysconfig.get_path("stdlib"))
    files = (f for f in sorted(root.rglob("*.py")) if not set(f.relative_to(root).parts) & set(LEFT_OUT))
    return "\n".join(f.read_text(encoding="utf-8", errors="ignore") for f in files)


def learning_rate(progress: float) -> float:
    """Linear warm-up over 2 % of the time, then linear decay to nothing."""
    return PEAK_LR * min(progress / 0.02, 1.0, (1.0 - progress) / 0.98 + 1e-3)


def pretrain(out: Path, seconds: float) -> None:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    model = LlamaForCausalLM(base_config(tokenizer))
    tokens = torch.tensor(tokenizer(standard_library_source(), add_special_tokens=False).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.05)
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        offsets = torch.randint(len(tokens) - SEQUENCE, (BATCH,))
        batch = torch.stack([tokens[o : o + SEQUENCE] for o in offsets.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"{progress:5.1%}  step {step}  {loss.item():.3f} nats/byte", flush=True)
        step += 1
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=900)
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.seconds)
