"""One config and one adapter in fastlora and in PEFT, and what training makes of both."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accuracy import assert_as_accurate_as_eager
from pairs import PREFIX, adapter_of, assert_same_tensors, bits, fill
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora

_SMALL = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same model at every call."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return made


def llama(tied: bool) -> Callable[[], nn.Module]:
    """A model whose output head has the weight of its input embedding, or has not."""
    return seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=tied, **_SMALL)))


def settings(*targets: str, **more: Any) -> dict[str, Any]:
    return dict(r=4, lora_alpha=8, target_modules=list(targets)) | more


def patched(make: Callable[[], nn.Module], settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    config = fastlora.LoraConfig(**settings)
    return fastlora.patch(make().to(dtype), config=config, allow_output_head=True)


def wrapped(make: Callable[[], nn.Module], settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return peft.get_peft_model(make().to(dtype), peft.LoraConfig(**settings))


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The first tensor that the model returns; `x` is the input of a model without names for its own."""
    result = model(batch["x"]) if "x" in batch else model(**batch)
    return result if isinstance(result, Tensor) else result[0]


def step(model: nn.Module, batch: dict[str, Tensor], adapter: str = "default") -> dict[str, Tensor]:
    """The output and the gradients of its mean square under the adapter's names."""
    model.zero_grad()
    y = output(model, batch)
    y.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in adapter_of(model, adapter).items() if p.grad is not None}
    assert gradients
    return {"output": y.detach()} | gradients


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 5) -> dict[str, Tensor]:
    """`step`, and the output after some steps of AdamW."""
    optimizer = torch.optim.AdamW(adapter_of(model).values(), lr=1e-3)
    first = {}
    for _ in range(steps):
        found = step(model, batch)
        first = first or found
        optimizer.step()
    with torch.no_grad():
        return first | {"trained output": output(model, batch)}


def as_float64(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}


def assert_trains_as_peft(
    make: Callable[[], nn.Module], settings: dict[str, Any], batch: dict[str, Tensor], seeds: int = 3
) -> None:
    """Holds outputs and gradients to the error of PEFT in float32, over several adapters."""
    runs = [
        (
            train(fill(patched(make, settings), seed).train(), batch),
            train(fill(wrapped(make, settings), seed).train(), batch),
            train(fill(wrapped(make, settings, torch.float64), seed).train(), as_float64(batch)),
        )
        for seed in range(seeds)
    ]
    for ours, theirs, exact in runs:
        assert ours.keys() == theirs.keys() == exact.keys()
    for key in ("output", "trained output"):
        assert_as_accurate_as_eager(*(torch.stack([run[i][key] for run in runs]) for i in range(3)), key)
    # Each gradient in units of its largest exact element, so that all of them count.
    units = [{n: t.abs().max() for n, t in run[2].items() if n.startswith(PREFIX)} for run in runs]
    assert all(unit > 0 for by_name in units for unit in by_name.values())
    flat = [
        torch.cat([
            (run[i][n] / unit.to(run[i][n].dtype)).flatten()
            for run, by_name in zip(runs, units, strict=True) for n, unit in by_name.items()
        ])
        for i in range(3)
    ]  # fmt: skip
    assert_as_accurate_as_eager(*flat, "gradients")


def assert_same_output(ours: nn.Module, theirs: nn.Module, batch: dict[str, Tensor]) -> None:
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        results = [output(model.eval(), b) for model, b in ((ours, batch), (theirs, batch), (exact, as_float64(batch)))]
    assert_as_accurate_as_eager(*results, "output")


def assert_same_draws(make: Callable[[], nn.Module], settings: dict[str, Any], dtype: torch.dtype) -> None:
    """One seed gives PEFT's adapter, bit for bit; a DoRA magnitude is no draw."""
    torch.manual_seed(5)
    ours = adapter_of(patched(make, settings, dtype))
    torch.manual_seed(5)
    theirs = adapter_of(wrapped(make, settings, dtype))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def assert_files_travel(
    make: Callable[[], nn.Module], settings: dict[str, Any], batch: dict[str, Tensor], folder: Path, extra: set[str]
) -> None:
    """Each library loads what the other saved, with the same tensors under the same names.

    Args:
        extra: names of base weights that PEFT writes besides.
    """
    ours, theirs = fill(patched(make, settings), 3), fill(wrapped(make, settings), 3)
    fastlora.save(ours, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    files = [load_file(folder / writer / "adapter_model.safetensors") for writer in ("ours", "theirs")]
    assert files[1].keys() - files[0].keys() == extra
    assert files[0].keys() == adapter_of(ours).keys()
    assert {name: t.shape for name, t in files[0].items()} == {
        name: t.shape for name, t in files[1].items() if name not in extra
    }
    configs = [json.loads((folder / writer / "adapter_config.json").read_text()) for writer in ("ours", "theirs")]
    for values in configs:
        values["target_modules"] = sorted(values["target_modules"])  # PEFT writes a set, in any order
        values.pop("peft_version")
    assert configs[0] == configs[1]
    loaded = peft.PeftModel.from_pretrained(make(), folder / "ours")
    result = loaded.load_adapter(folder / "ours", "again")
    assert not result.unexpected_keys
    assert not result.missing_keys
    back = fastlora.load(make(), folder / "theirs")
    for model, file in ((loaded, files[0]), (back, files[1])):
        found = adapter_of(model)
        assert found.keys() == file.keys() - extra
        assert all(torch.equal(found[name], file[name]) for name in found)
    assert_same_output(ours, loaded, batch)
    assert_same_output(back, theirs, batch)


def assert_merges(make: Callable[[], nn.Module], settings: dict[str, Any], batch: dict[str, Tensor]) -> None:
    """Merged, unmerged, disabled and unloaded, with the numbers of the adapter and the bits of the model."""
    original = make()
    model = fill(patched(make, settings), 3).eval()
    frozen, exact_model = bits(model), copy.deepcopy(model).double()
    with torch.no_grad():
        base, with_adapter = output(original.eval(), batch), output(model, batch)
        exact = output(exact_model, as_float64(batch))
    assert not torch.equal(base, with_adapter)
    with fastlora.disabled(model), torch.no_grad():
        assert torch.equal(output(model, batch), base)
    fastlora.merge(model)
    with torch.no_grad():
        # What a weight loses by rounding is no less than what a product does: the bound is that of the unmerged model.
        merged = output(model, batch)
        assert_as_accurate_as_eager(merged, with_adapter, exact, "merged")
    with fastlora.disabled(model), torch.no_grad():
        assert torch.equal(output(model, batch), base)
    with torch.no_grad():
        assert torch.equal(output(model, batch), merged)
    fastlora.unmerge(model)
    assert_same_tensors(bits(model), frozen)
    with torch.no_grad():
        assert torch.equal(output(model, batch), with_adapter)
    twin = copy.deepcopy(model)
    assert_undone(fastlora.unload(model), original)
    fastlora.unload(twin, merge=True)
    assert classes(twin) == classes(original)
    with torch.no_grad():
        assert_as_accurate_as_eager(output(twin, batch), with_adapter, exact, "merged for good")


def classes(model: nn.Module) -> list[str]:
    """By name: a parametrised module has a class of its own."""
    return [f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()]


def assert_undone(model: nn.Module, original: nn.Module) -> None:
    """Classes, attributes, parameters and which of them train are those of the original."""
    assert classes(model) == classes(original)
    assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in original.modules()]
    assert_same_tensors(bits(model), bits(original))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in original.named_parameters()
    ]
