"""Makes of a base and an adapter what servers load, and checks it: merged, merged in int8, and the adapter alone.

    python examples/serve.py MODEL ADAPTER OUT

The model is never loaded for this, only in the end, to write a line with it. The command goes on where it was
interrupted when it is repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora


def merge_and_verify(base: Path, adapter: Path, out: Path) -> Path:
    """The merged model in the base's dtype, every tensor of it checked."""
    merged = out / "merged"
    if not (merged / "config.json").is_file():  # written last
        fastlora.merge_checkpoint(base, adapter, merged)
    checked = fastlora.verify_checkpoint(base, adapter, merged)
    if not checked.ok:
        raise SystemExit(f"{merged} is not base + adapter: {checked.problems[0]}")
    print(f"{merged}: {len(checked.tensors)} tensors are base + adapter")
    return merged


def export(base: Path, adapter: Path, out: Path) -> Path:
    """The merged model in int8, and the adapter as vLLM and llama.cpp read it."""
    served = out / "served"
    for folder, format in ((served, "int8"), (out / "portable", "portable")):
        if not folder.is_dir():
            report = fastlora.export_checkpoint(base, adapter, folder, to=format)
            print(f"{folder}: {report.format}, {report.bytes:,} bytes of weights")
    if not fastlora.verify_checkpoint(base, adapter, served).ok:
        raise SystemExit(f"{served} is off by more than int8 rounds")
    return served


def generate(folder: Path, prompt: str) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the base")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", default="Hello")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    merged = merge_and_verify(options.model, options.adapter, options.out)
    served = export(options.model, options.adapter, options.out)
    for folder in (merged, served):
        print(f"{folder} writes {generate(folder, options.prompt)!r}")
