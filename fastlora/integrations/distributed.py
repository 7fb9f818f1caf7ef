"""Sharding a patched model with PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..adapters.registry import adapters, check_original_weights, check_unmerged, patched_layers
from ..models.distributed import check_whole

FIRST_WITH_INT8 = (2, 12)  # of torch: FSDP2 of an earlier one wants every parameter to be able to train


def shard(model: nn.Module, *, blocks: Iterable[nn.Module] | None = None, **settings: Any) -> nn.Module:
    """Shards a patched model over the processes, each block and then the rest, with `fully_shard` of PyTorch (FSDP2).

    Every process holds its part of the frozen weights, int8 ones too (from torch 2.12 on), and of the adapters. Nothing
    here is more than calls of `fully_shard`: a model that accelerate or another caller of it shards works as well. What
    this adds is what FSDP2 asks of its caller: the parameters of one group that train have one dtype, so modules that
    train in another one than the adapters, as those of `modules_to_save` do in a 16-bit model, become groups of their
    own.

        torch.distributed.init_process_group()
        fastlora.patch(model, r=16, quantize="int8")  # everything that adds or merges adapters comes first
        fastlora.shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)  # after it: it makes new ones
        ...  # each process with its own part of the data
        fastlora.save(model, "adapter")  # called by every process, written by the first

    To resume, `torch.distributed.checkpoint.state_dict` gathers what trains, with the optimizer's state:
    `get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True,
    ignore_frozen_params=True))`; and `set_state_dict` puts it back into a model that was patched and sharded alike.
    `fastlora.hotswap` puts an adapter's folder in. Where a process dies, the others fail in their next collective,
    at once with gloo and after the group's timeout at the latest; torchrun ends them.

    The 16-bit dtype of a mixed precision policy is also that of the int8 weights' scales, rounded as they are gathered.

    A mask of dropout follows from its process' generator. Processes with one seed draw one mask for their different
    rows, as with `nn.Dropout`; `torch.manual_seed(seed + rank)` behind `patch`, or accelerate's
    `set_seed(seed, device_specific=True)`, gives each its own.

    Args:
        blocks: the modules that are gathered one at a time; None means those that a transformers model names in
            `_no_split_modules`, its decoder layers.
        settings: for `fully_shard`, such as mesh, mp_policy, reshard_after_forward, offload_policy.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched, is sharded or merged already, or has weights that an initialisation
            changed, has no blocks, has parameters in one layer that train in two dtypes, or has int8 weights, which
            FSDP2 shards from torch 2.12 on; nothing is sharded then.
    """
    from torch.distributed.fsdp import fully_shard

    patched_layers(model)
    check_whole(model)
    check_unmerged(model)
    check_original_weights(model)
    _check_int8(model)
    found = _blocks(model) if blocks is None else list(blocks)
    for module in [*_apart(model), *found, model]:
        fully_shard(module, **settings)
    return model


def _check_int8(model: nn.Module) -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < FIRST_WITH_INT8 and not all(p.is_floating_point() for p in model.parameters()):
        raise ValueError(f"model: expected torch 2.12 or later to shard int8 weights, found torch {torch.__version__}")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers keeps on one device, innermost first."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    if not found:
        raise ValueError(f"blocks: expected the modules to shard one by one, found none in {type(model).__name__}")
    return found[::-1]


def _apart(model: nn.Module) -> list[nn.Module]:
    """The modules that train in another dtype than the adapters."""
    layers = patched_layers(model).values()
    parts = [part for layer in layers for name in adapters(model) for part in layer.parts(name).values()]
    usual = next((part.dtype for part in parts if part.requires_grad), torch.float32)
    found = [module for module in model.modules() if _trained_dtypes(module, recurse=False) - {usual}]
    for module in found:
        dtypes = _trained_dtypes(module)
        if len(dtypes) > 1:
            raise ValueError(
                f"model: expected each layer to train in one dtype, as FSDP2 does, found {sorted(map(str, dtypes))} in "
                f"one {type(module).__name__}; load the model in float32 and give mp_policy the 16-bit dtype"
            )
    return found


def _trained_dtypes(module: nn.Module, recurse: bool = True) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters(recurse) if parameter.requires_grad}
