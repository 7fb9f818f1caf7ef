"""Counting what autograd holds between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Storages = dict[int, torch.UntypedStorage]


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[Storages]:
    """The storages that autograd saves inside a `with` block, by address, without those of the model's weights."""
    weights = {_address(tensor) for tensor in _weights(model)}
    found: Storages = {}

    def keep(tensor: Tensor) -> Tensor:
        # Kept alive, so that no later tensor is found at the same address.
        if _address(tensor) not in weights:
            found[_address(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def bytes_for_backward(model: nn.Module, forward: Callable[[], Tensor], inputs_of: set[str] = frozenset()) -> int:
    """Bytes held between a forward and its backward, each storage once, the model's weights left out.

    Args:
        forward: returns the loss.
        inputs_of: names of modules whose inputs count as held too, whoever holds them.
    """
    handles, inputs = [], {}
    for name, module in model.named_modules():
        if name in inputs_of:
            handles.append(module.register_forward_pre_hook(lambda _, x: inputs.update(_storage(x[0]))))
    with saved_storages(model) as held:
        loss = forward()
    held |= inputs
    weights = {_address(tensor) for tensor in _weights(model)}
    for tensor in _tensors_on_nodes(loss):
        if _address(tensor) not in weights:
            held |= _storage(tensor)
    for handle in handles:
        handle.remove()
    return sum(storage.nbytes() for storage in held.values())


def _tensors_on_nodes(loss: Tensor) -> Iterator[Tensor]:
    """Tensors that autograd functions written in Python keep as attributes, out of sight of the hooks."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for value in getattr(node, "__dict__", {}).values():
            yield from (v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, Tensor))


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        # bitsandbytes keeps its codes and scales here.
        state = getattr(module, "state", None)
        yield from (t for t in (getattr(state, "CB", None), getattr(state, "SCB", None)) if t is not None)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storage(tensor: Tensor) -> Storages:
    return {_address(tensor): tensor.untyped_storage()}
