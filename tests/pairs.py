"""Our model and PEFT's, with the same adapters, side by side."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from accuracy import assert_as_accurate_as_eager
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora
from fastlora.adapters.registry import lora_layers

PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"
Run = Callable[[nn.Module], Tensor]  # a model's outputs on some batch


def adapter_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of an adapter by the names that PEFT's files give them, in the order of the names."""
    if isinstance(model, peft.PeftModel):
        named = {name: p for name, p in model.named_parameters() if f".{adapter}." in f"{name}."}
        found = {name.replace(f".{adapter}", "").replace("_vector.weight", "_vector"): p for name, p in named.items()}
    else:
        found = {
            f"{PREFIX}{layer.name_in_files(name, adapter)}.{part}": p
            for name, layer in lora_layers(model).items()
            for part, p in layer.parts(adapter).items()
        }
    return dict(sorted(found.items()))


def fill(model: nn.Module, seed: int, adapter: str = "default") -> nn.Module:
    """Random values for an adapter, the same for every model of one shape; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_of(model, adapter).items():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values.abs() if "magnitude" in name else values / parameter[0].numel() ** 0.5)
    return model


def make_pair(make: Callable[[], nn.Module], settings: dict[str, Any], seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Our model and PEFT's, with one adapter each, drawn under one seed."""
    torch.manual_seed(seed)
    model = make()
    theirs = copy.deepcopy(model)
    torch.manual_seed(seed + 1)
    ours = fastlora.patch(model, config=fastlora.LoraConfig(**settings))
    torch.manual_seed(seed + 1)
    return ours, peft.get_peft_model(theirs, peft.LoraConfig(**settings))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_is_original(model: nn.Module, original: nn.Module) -> None:
    """A model from which everything was taken off again is what it was, and trains."""
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in original.modules()]
    assert_same_tensors(bits(model), bits(original))
    assert all(parameter.requires_grad for parameter in model.parameters())


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def assert_files_go_both_ways(
    make: Callable[[], nn.Module], settings: dict[str, Any], run: Run, folder: Path, adapter: str = "default"
) -> None:
    """Either saves what the other loads, tensor for tensor, and then computes the same."""
    ours, theirs = (fill(model, 3) for model in make_pair(make, settings))
    fastlora.save(ours, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    files = [load_file(folder / writer / WEIGHTS_FILE) for writer in ("ours", "theirs")]
    assert_same_tensors(*files)
    assert read_config(folder / "ours") == read_config(folder / "theirs")
    torch.manual_seed(0)
    reloaded = fastlora.load(make(), folder / "theirs", adapter)
    torch.manual_seed(0)
    peft_reloaded = peft.PeftModel.from_pretrained(make(), folder / "ours", adapter)
    for model in (reloaded, peft_reloaded):
        assert_same_tensors({name: p.data for name, p in adapter_of(model, adapter).items()}, files[0])
    with torch.no_grad():
        assert torch.equal(run(reloaded.eval()), run(ours.eval()))
        assert torch.equal(run(peft_reloaded.eval()), run(theirs.eval()))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter, whose lists PEFT writes in any order."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("peft_version")
    return {name: sorted(value) if isinstance(value, list) else value for name, value in config.items()}


def train(model: nn.Module, weights: dict[str, nn.Parameter], run: Run, steps: int = 5) -> dict[str, Tensor]:
    """Outputs, the gradients of weights and, with several steps of AdamW on them, the outputs after these."""
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3)
    results: dict[str, Tensor] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        y = run(model)
        y.square().mean().backward()
        if not results:
            results = {"outputs": y.detach()} | {f"gradient of {name}": p.grad.clone() for name, p in weights.items()}
        optimizer.step()
    return results | {"trained outputs": run(model).detach()} if steps > 1 else results


def assert_trains_like(
    make_two: Callable[[int], tuple[nn.Module, nn.Module]],
    run: Run,
    weights_of: Callable[[nn.Module], dict[str, nn.Parameter]] = adapter_of,
    steps: int = 5,
    exact_of: Callable[[nn.Module], nn.Module] = lambda eager: copy.deepcopy(eager).double(),
) -> None:
    """Holds the training of the first model to the error of the second one against what is exact, in float64.

    The gradients count in units of their largest element. All are pooled, over several adapters too: the largest error
    of one of them is a matter of luck.
    """
    pools: tuple[dict[str, list[Tensor]], ...] = ({}, {}, {})
    for seed in range(3):
        ours, eager = make_two(seed)
        models = ours, eager, exact_of(eager)
        results = [train(model.train(), weights_of(model), run, steps) for model in models]
        for pool, result in zip(pools, results, strict=True):
            for name, tensor in sorted(result.items()):
                largest = results[2][name].abs().max()
                unit = largest.to(tensor.dtype) if name.startswith("gradient") and largest > 0 else 1.0
                pool.setdefault(name.split(" of ")[0], []).append((tensor / unit).flatten())
    for name in pools[0]:
        assert_as_accurate_as_eager(*(torch.cat(pool[name]) for pool in pools), name)


def assert_trains_as_peft(make: Callable[[], nn.Module], settings: dict[str, Any], run: Run, **options: Any) -> None:
    def make_two(seed: int) -> tuple[nn.Module, nn.Module]:
        ours, theirs = make_pair(make, settings, seed)
        return fill(ours, seed), fill(theirs, seed)

    assert_trains_like(make_two, run, **options)
