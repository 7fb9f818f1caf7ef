"""Replacing an adapter's values while the model runs."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoraConfig
from ..models.distributed import copy_into, keep_shards_alone
from ..models.targets import scaling_of
from .files import fit, read_tensors
from .registry import adapters, check_known, check_unmerged, lora_layers
from .trained import copies_of


@torch.no_grad()
def hotswap(model: nn.Module, path: str | PathLike[str], adapter: str = "default") -> nn.Module:
    """Gives an adapter the values of a folder of PEFT's format, in place, so that compiled code stays valid.

    The rank may be lower than the adapter's, the rest is zero, and another scaling goes into B. A layer that the
    folder has nothing for computes as the frozen one. Every process calls this for a model that FSDP2 has sharded.

    Returns:
        The same model.

    Raises:
        ValueError: there is no adapter of that name, one is merged, or the folder does not fit the adapter: another
            layer, a higher rank, or more than A and B; the model is then as it was.
    """
    check_known(model, adapter)
    check_unmerged(model)
    folder = Path(path)
    config = LoraConfig.from_folder(folder)
    _, parts, copies = fit(model, config, read_tensors(folder), folder)
    layers = {layer.name_in_config(name): layer for name, layer in lora_layers(model).items() if layer.has(adapter)}
    if copies or copies_of(model, adapter):
        raise ValueError(f"{folder}: expected adapters without trained modules or biases, found some")
    for name, found in parts.items():
        if name not in layers:
            raise ValueError(f"{folder}: expected weights for layers of {adapter!r}, found some for {name!r}")
        _check_fits(name, found, layers[name].parts(adapter), folder)
    keep_shards_alone(model)
    for name, layer in layers.items():
        ratio = scaling_of(config, name) / scaling_of(adapters(model)[adapter], name)
        for part, parameter in layer.parts(adapter).items():
            factor = ratio if part in ("lora_B.weight", "lora_B.bias") else 1.0
            value = parts[name][part] if name in parts else torch.zeros(())
            copy_into(parameter, _padded(factor * value, parameter))
    return model


def _check_fits(name: str, found: dict[str, Tensor], parameters: dict[str, nn.Parameter], folder: Path) -> None:
    if found.keys() != parameters.keys():
        raise ValueError(f"{folder}: expected {sorted(parameters)} for {name!r}, found {sorted(found)}")
    rank, room = found["lora_A.weight"].shape[0], parameters["lora_A.weight"].shape[0]
    if rank > room:
        raise ValueError(f"{folder}: expected a rank of at most {room} for {name!r}, found {rank}")


def _padded(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with zeros up to the shape of another."""
    padding = [(0, wanted - found) for found, wanted in zip(tensor.shape, like.shape, strict=tensor.dim() > 0)]
    return F.pad(tensor, [edge for pair in reversed(padding) for edge in pair])
