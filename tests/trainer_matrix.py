"""Every way to train a tiny Llama with adapters: does the loss fall, and does a resumed run equal a straight one?

    python tests/trainer_matrix.py

prints the table in Markdown. A run of six steps saves a checkpoint after the third. A model made anew, whose adapter
starts elsewhere, goes on from it; its losses and weights must be those of the straight run, bit for bit.

Compiled cells use the backend aot_eager: what dynamo and AOTAutograd make of the model, operator by operator. Inductor
compiles for half a minute per cell, so `test_trainer.py` runs it once.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora

STEPS, SAVED, RATE, TOKENS = 6, 3, 3e-2, 32
TARGETS = ["q_proj", "v_proj", "down_proj"]
CHECKPOINTING = {"off": None, "reentrant": True, "non-reentrant": False}
VOCABULARY = 64


@dataclass(frozen=True)
class Setting:
    """What of a cell does not depend on who drives the training."""

    dtype: torch.dtype
    checkpointing: str
    compiled: bool
    quantize: str | None

    def __str__(self) -> str:
        dtype, weights = str(self.dtype).removeprefix("torch."), self.quantize or "dense"
        return f"{dtype}, checkpointing {self.checkpointing}, {'compiled' if self.compiled else 'eager'}, {weights}"

    @property
    def reentrant(self) -> dict[str, bool] | None:
        chosen = CHECKPOINTING[self.checkpointing]
        return None if chosen is None else {"use_reentrant": chosen}


@dataclass(frozen=True)
class Run:
    """Losses by step, the weights that train by name, and the loss over all texts in the end."""

    losses: dict[int, float]
    weights: dict[str, Tensor]
    final: float


@dataclass(frozen=True)
class Cell:
    """One cell's outcome."""

    driver: str
    setting: Setting
    before: float
    after: float
    exact: bool

    @property
    def falls(self) -> bool:
        return self.after < self.before

    @property
    def row(self) -> str:
        found = f"{self.before:.4f} to {self.after:.4f}" + ("" if self.falls else ", NOT FALLING")
        parts = str(self.setting).replace("checkpointing ", "").split(", ")
        return " | ".join(["", self.driver, *parts, found, "exact" if self.exact else "DIFFERENT", ""]).strip()


HEADER = (
    "| driver | dtype | checkpointing | mode | weights | loss over all texts | resumed at step 3 |\n|"
    + "---|" * 7
)  # fmt: skip
SETTINGS = [
    Setting(dtype, checkpointing, compiled, quantize)
    for dtype, checkpointing, compiled, quantize in itertools.product(
        (torch.bfloat16, torch.float32), CHECKPOINTING, (False, True), (None, "int8")
    )
]


def make_model(setting: Setting, adapter_seed: int) -> Any:
    """A Llama of one layer, the same for every seed, with an adapter that depends on it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=TOKENS, use_cache=False, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(setting.dtype)
    torch.manual_seed(adapter_seed)
    return fastlora.patch(model, r=4, targets=TARGETS, dropout=0.1, quantize=setting.quantize)


def examples() -> list[dict[str, list[int]]]:
    """Rows of four texts."""
    ids = torch.randint(2, VOCABULARY, (4, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": ids[i % 4], "labels": ids[i % 4]} for i in range(4 * STEPS)]


def batches() -> list[dict[str, Tensor]]:
    rows = examples()
    groups = [rows[4 * i : 4 * i + 4] for i in range(STEPS)]
    return [{name: torch.tensor([row[name] for row in group]) for name in rows[0]} for group in groups]


@torch.no_grad()
def loss_of(model: Any) -> float:
    """The loss over all texts without dropout."""
    return model.eval()(**batches()[0]).loss.item()


def outcome(model: nn.Module, losses: dict[int, float]) -> Run:
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return Run(losses, weights, loss_of(model))


def trainer_settings(setting: Setting, folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=STEPS, save_steps=SAVED, logging_steps=1,
        learning_rate=RATE, report_to=[], use_cpu=True, disable_tqdm=True, bf16=setting.dtype == torch.bfloat16,
        gradient_checkpointing=setting.reentrant is not None, gradient_checkpointing_kwargs=setting.reentrant,
    )  # fmt: skip
    return settings | (dict(torch_compile=True, torch_compile_backend="aot_eager") if setting.compiled else {})


def drive_trainer(trainer: Any, model: nn.Module, resume: bool, folder: Path) -> Run:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    return outcome(model, losses)


def run_trainer(setting: Setting, model: Any, folder: Path, resume: bool) -> Run:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**trainer_settings(setting, folder))
    return drive_trainer(Trainer(model=model, args=arguments, train_dataset=examples()), model, resume, folder)


def run_sft(setting: Setting, model: Any, folder: Path, resume: bool) -> Run:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from fastlora.quickstart.demo import BASE

    prepared = dict(max_length=TOKENS, dataset_kwargs={"skip_prepare_dataset": True})
    arguments = SFTConfig(**trainer_settings(setting, folder), **prepared)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(examples()),
        processing_class=AutoTokenizer.from_pretrained(BASE),
    )  # fmt: skip
    return drive_trainer(trainer, model, resume, folder)


def run_plain(setting: Setting, model: Any, folder: Path, resume: bool) -> Run:
    from safetensors.torch import load_file

    if setting.reentrant is not None:
        fastlora.prepare_for_training(model, checkpointing_kwargs=setting.reentrant)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def save() -> None:
        model.save_pretrained(folder)
        torch.save({"optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, folder / "state.pt")

    if resume:
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        state = torch.load(folder / "state.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
    call = torch.compile(model, backend="aot_eager") if setting.compiled else model
    return loop(model, call, optimizer, torch.Tensor.backward, save, resume)


def run_accelerate(setting: Setting, model: Any, folder: Path, resume: bool) -> Run:
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    if setting.reentrant is not None:
        fastlora.prepare_for_training(model, checkpointing_kwargs=setting.reentrant)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if setting.dtype == torch.bfloat16 else "no",
        dynamo_plugin=TorchDynamoPlugin(backend="aot_eager" if setting.compiled else "no"),
    )  # fmt: skip
    call, optimizer = accelerator.prepare(model, optimizer)
    if resume:
        accelerator.load_state(str(folder))
    return loop(model, call, optimizer, accelerator.backward, lambda: accelerator.save_state(str(folder)), resume)


def loop(
    model: nn.Module, call: Any, optimizer: Any, backward: Callable, save: Callable[[], None], resume: bool
) -> Run:
    losses = {}
    call.train()
    for step, batch in enumerate(batches(), start=1):
        if resume and step <= SAVED:
            continue
        loss = call(**batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.item()
        if step == SAVED and not resume:
            save()
    return outcome(model, losses)


DRIVERS = {
    "Trainer": run_trainer, "SFTTrainer": run_sft, "plain loop": run_plain, "accelerate": run_accelerate,
}  # fmt: skip


def run_cell(driver: str, setting: Setting, folder: Path) -> Cell:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # it is one per process, and keeps its first precision
    folder.mkdir(parents=True, exist_ok=True)
    before = loss_of(make_model(setting, adapter_seed=1))
    straight = DRIVERS[driver](setting, make_model(setting, adapter_seed=1), folder, False)
    resumed = DRIVERS[driver](setting, make_model(setting, adapter_seed=2), folder, True)
    later = range(SAVED + 1, STEPS + 1)
    same_losses = all(resumed.losses[step] == straight.losses[step] for step in later)
    assert straight.weights.keys() == resumed.weights.keys()
    same_weights = all(torch.equal(resumed.weights[name], value) for name, value in straight.weights.items())
    return Cell(driver, setting, before, straight.final, same_losses and same_weights)


def run_setting(setting: Setting, folder: Path) -> Iterator[Cell]:
    """The cells of all drivers; compiled ones share what was compiled, and none may fall back to eager."""
    import torch._dynamo

    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["frames"]["ok"]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for driver in DRIVERS:
            yield run_cell(driver, setting, folder / driver.replace(" ", "-"))
    if setting.compiled and torch._dynamo.utils.counters["frames"]["ok"] == before:
        raise AssertionError(f"{setting}: nothing was compiled")


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(HEADER)
    cells = []
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            for cell in run_setting(setting, Path(folder)):
                cells.append(cell)
                print(cell.row, flush=True)
    wrong = [cell for cell in cells if not (cell.falls and cell.exact)]
    print(f"\n{len(cells)} cells, {len(wrong)} of them wrong.")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
