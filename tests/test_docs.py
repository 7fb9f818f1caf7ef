"""Every snippet of the guides and every example, as a reader would copy them, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora.quickstart.demo import BASE

ROOT = Path(__file__).parent.parent
GUIDES = sorted(file for file in (ROOT / "docs").glob("*.md") if "```" in file.read_text())
RUN = {"python", "sh", "yaml"}
SHOWN = {"text"}  # output, and commands of other programs
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with what the guides start from: a model, an adapter, and instructions."""
    folder = tmp_path_factory.mktemp("guide")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    fastlora.patch(model, r=4, targets="all-linear")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    fastlora.save(model, folder / "adapter")
    pairs = [{"prompt": f"What is {i} + {i}?", "completion": f" {2 * i}"} for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture
def workplace(material, tmp_path) -> Path:
    """A copy of the material, beside the examples and with the command `fastlora`."""
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "bin").mkdir()
    for name, module in (("fastlora", "fastlora.cli"), ("torchrun", "torch.distributed.run")):
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        command.chmod(0o755)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def snippets(guide: Path) -> list[tuple[str, str]]:
    return FENCE.findall(guide.read_text())


def session(guide: Path) -> str:
    """A guide as one Python session with a shell beside it; a snippet that starts with a file's name is that file."""
    lines = ["import pathlib, subprocess"]
    for language, text in snippets(guide):
        file = re.match(r"# (\w+\.(py|yaml))\n", text)
        if file:
            lines.append(f"pathlib.Path({file.group(1)!r}).write_text({text!r})")
        elif language == "python":
            lines.append(text)
        elif language == "sh":
            lines.append(f"subprocess.run(['sh', '-ec', {text!r}], check=True)")
    return "\n".join(lines)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_snippets_are_run_or_shown(guide):
    assert {language for language, _ in snippets(guide)} <= RUN | SHOWN
    assert all(text.startswith("# ") for language, text in snippets(guide) if language == "yaml"), "no file's name"
    assert len(snippets(guide)) == guide.read_text().count("```") // 2


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_can_be_followed(guide, workplace):
    if guide.stem == "training":
        shutil.rmtree(workplace / "adapter")  # it is made there
    run([sys.executable, "-c", session(guide)], workplace)


def test_example_finetune(workplace):
    arguments = ["model", "data.jsonl", "out", "--epochs", "3", "--rate", "1e-2"]
    output = run([sys.executable, "examples/finetune.py", *arguments], workplace)
    before, after = re.search(r"perplexity ([\d.]+) before, ([\d.]+) after", output).groups()
    assert float(after) < float(before)
    again = run([sys.executable, "examples/finetune.py", *arguments], workplace)
    assert f"{after} after" in again, "it does not go on from the last checkpoint"
    fastlora.load(LlamaForCausalLM.from_pretrained(workplace / "model"), workplace / "out" / "adapter")


def test_example_several_adapters(workplace):
    lines = [{"text": f"{i} {name}", "adapter": name} for i in range(12) for name in ("law", "code")]
    (workplace / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = run(
        [sys.executable, "examples/several_adapters.py", "model", "rows.jsonl", "out", "--steps", "6"], workplace
    )
    assert re.search(r"code: loss [\d.]+ in its last batch", output)
    for name in ("law", "code"):
        fastlora.load(LlamaForCausalLM.from_pretrained(workplace / "model"), workplace / "out" / name)


def test_example_serve(workplace):
    command = [sys.executable, "examples/serve.py", "model", "adapter", "out", "--prompt", "What"]
    first = run(command, workplace)
    assert "tensors are base + adapter" in first
    assert first.splitlines()[-1].startswith("out/served writes 'What")
    assert run(command, workplace).splitlines()[-1] == first.splitlines()[-1]
