"""Models whose parameters are spread over several processes: what is known of them, and what they are asked for.

FSDP2 (`torch.distributed.fsdp.fully_shard`) leaves a model's modules and names as they are and makes each parameter a
DTensor, of which a process holds some rows. It may do that to a patched model, and an adapter's parameters can then be
gathered and written to. Nothing may be added to such a model and no frozen weight of it replaced, for FSDP2 would not
know of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import is_dtensor

_BEFORE = "do that before torch.distributed.fsdp.fully_shard"


def check_whole(model: nn.Module, advice: str = _BEFORE) -> None:
    """Raises ValueError where a parameter of the model is spread over several processes.

    Args:
        advice: what to do about a model that FSDP2 has sharded.
    """
    tp_size = getattr(model, "tp_size", None)
    if tp_size is not None and tp_size > 1:
        _refuse(f"a tensor-parallel model (tp_size={tp_size})", "load it without a plan and shard it with fully_shard")
    # Where nothing has imported it, no configuration of DeepSpeed is in force.
    deepspeed = sys.modules.get("transformers.integrations.deepspeed")
    if deepspeed is not None and deepspeed.is_deepspeed_zero3_enabled():
        _refuse("DeepSpeed ZeRO stage 3", "use stage 1 or 2, or torch.distributed.fsdp.fully_shard")
    for name, parameter in model.named_parameters():
        engine = _foreign(parameter)
        if engine:
            _refuse(f"{name} spread by {engine}", "use torch.distributed.fsdp.fully_shard")
        if is_dtensor(parameter):
            _refuse(f"{name} with placements {list(parameter.placements)}", advice)  # type: ignore[attr-defined]
    if is_sharded(model):
        _refuse("a model that FSDP2 has sharded", advice)


def _refuse(found: str, advice: str) -> None:
    raise ValueError(f"model: expected whole parameters in every process, found {found}; {advice}")


def _foreign(tensor: Any) -> str:
    """The engine that has spread a tensor in a way of its own, or nothing."""
    if hasattr(tensor, "ds_id"):
        return "DeepSpeed ZeRO stage 3"
    return "FSDP1" if getattr(tensor, "_fsdp_flattened", False) else ""


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model or a part of it."""
    return any(True for _ in _sharded_modules(model))


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def keep_shards_alone(model: nn.Module) -> None:
    """Frees the whole parameters that FSDP2 keeps after a forward without a backward, so that each is a DTensor."""
    for module in _sharded_modules(model):
        module.reshard()


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor; where one is a DTensor, every process has to call this.

    Raises:
        ValueError: a tensor is spread by an engine that it cannot be gathered from.
    """
    for name, tensor in tensors.items():
        engine = _foreign(tensor)
        if engine:
            raise ValueError(f"{name}: expected a whole tensor or one that FSDP2 has sharded, found one of {engine}")
    return {name: _whole(tensor.detach()) for name, tensor in tensors.items()}


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


@torch.no_grad()
def copy_into(parameter: Any, value: Tensor) -> None:
    """Writes a whole value, the same in every process, into a parameter or into the shards of it."""
    if is_dtensor(parameter):
        value = value.to(parameter.device, parameter.dtype)
        value = sys.modules["torch.distributed.tensor"].distribute_tensor(
            value, parameter.device_mesh, parameter.placements
        )  # fmt: skip
    parameter.copy_(value)


def rank() -> int:
    """This process' number, 0 where there is one."""
    return torch.distributed.get_rank() if _started() else 0


def in_first_process(work: Callable[[], None], together: bool = True) -> None:
    """Does some work in the first process, while the others wait for its end.

    Args:
        together: whether every process calls this; if not, the one that does works.

    Raises:
        OSError: in the other processes, where the work failed.
    """
    if not together:
        work()
        return
    failure = ["the first process was interrupted"]
    try:
        if rank() == 0:
            work()
        failure = [""]
    except Exception as error:
        failure = [str(error)]
        raise
    finally:
        torch.distributed.broadcast_object_list(failure)
    if failure[0]:
        raise OSError(f"in the first process: {failure[0]}")


def processes() -> int:
    """How many processes work together."""
    return torch.distributed.get_world_size() if _started() else 1


def _started() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
