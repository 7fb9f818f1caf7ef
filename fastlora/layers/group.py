"""Layers that read the same tensor, such as query, key and value, computed together as they are called one by one.

A parent calls `q_proj(x)`, `k_proj(x)`, `v_proj(x)`. The first of them computes the outputs of all in one op, and the
others hand theirs out when they are called, in this order, with the very same tensor in the same state. Any call that
does not fit is computed by itself, as without a group, and the group computes nothing ahead any more.

That happens within the parent's forward alone, which two hooks tell of; at its end the second drops what nobody asked
for, also after an error. It is kept by thread, since the threads of a `DataParallel` or of a server share modules.

A checkpoint's recomputation has to save what its forward saved, tensor by tensor. So where hooks on saved tensors are
installed, which is how a checkpoint works, a group does for good what it did there at first. In code that is compiled
every layer computes by itself: a compiler may neither see what was computed ahead nor whether x has changed since.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import ops
from .branch import draw_seed

FEW_TOKENS = 64  # up to here a GPU reads x in each layer's one launch
_PLAIN = {Tensor, nn.Parameter}


@dataclass
class Kind:
    """The groups of one class and place, of which a model has one per layer.

    Attributes:
        shares: whether their members are thought to read the same tensor.
    """

    shares: bool = True


@dataclass
class Ahead:
    """Outputs computed ahead: for which input in which state, with which operands, and those not handed out yet.

    Operands and outputs are by place, in the order of the calls.
    """

    x: Tensor
    state: tuple
    operands: dict[int, tuple]
    outputs: dict[int, Tensor]


@dataclass(eq=False)
class Group:
    """What the members of one group share.

    Attributes:
        kind: what is known of all groups like this one.
        checkpointed: what the group does under hooks on saved tensors; None until the first time.
        ahead: by thread that runs the parent's forward, what was computed ahead, if anything.
        hooks: `open` and `close` on the parent.
    """

    kind: Kind
    checkpointed: bool | None = None
    ahead: dict[int, Ahead | None] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)

    def may_compute(self) -> bool:
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return self.kind.shares
        if self.checkpointed is None:
            self.checkpointed = self.kind.shares
        return self.checkpointed

    def open(self, parent: nn.Module, inputs: Any) -> None:
        """Notes that the parent's forward begins."""
        if not torch.compiler.is_compiling():
            self.ahead[threading.get_ident()] = None

    def close(self, parent: nn.Module, inputs: Any, output: Any) -> None:
        """Drops what nobody asked for; after an error there is no output."""
        if torch.compiler.is_compiling():
            return
        if self.ahead.pop(threading.get_ident(), None) is not None and output is not None:
            self.kind.shares = False


@dataclass(eq=False)
class Seat:
    """One member's place in its group.

    Attributes:
        group: the group.
        place: when the parent calls the member, among the members.
        followers: the other members, for the first one. The others do not refer back: a cycle would keep the weights
            of a deleted model until the next garbage collection.
    """

    group: Group
    place: int
    followers: list[Any]

    def output(self, member: Any, x: Tensor) -> Tensor | None:
        """The member's output for x, where the group has it or computes it; None where the member is to compute."""
        if torch.compiler.is_compiling():
            return None
        group, thread = self.group, threading.get_ident()
        if thread not in group.ahead:
            return None
        ahead = group.ahead[thread]
        if ahead is None:
            return self._compute(thread, member, x) if self.place == 0 and _pays(x) and group.may_compute() else None
        if self.place not in ahead.operands and not member.running_adapters():
            return None  # it has no part in this, and draws no seed
        if self.place != next(iter(ahead.outputs)) or not _fits(ahead, self.place, member, x):
            group.kind.shares, group.ahead[thread] = False, None
            return None
        y = ahead.outputs.pop(self.place)
        if not ahead.outputs:
            group.ahead[thread] = None
        return y

    def _compute(self, thread: int, first: Any, x: Tensor) -> Tensor | None:
        """The first member's output; those of the others are kept for them."""
        if type(x) not in _PLAIN or x.is_inference():  # whose changes are not counted
            return None
        operands = {}
        for place, member in enumerate((first, *self.followers)):
            found = _operands(member, x)
            if found is not None:
                operands[place] = found
            elif place == 0 or member.mix is not None or member.running_adapters():
                return None  # seeds are drawn in the order of the calls, so all who draw are in it or none
        if len(operands) == 1:
            return None
        ws, w_scales, a_s, b_s, scales, ps, biases, thresholds = zip(*operands.values(), strict=True)
        if len(set(thresholds)) > 1:
            return None
        seeds = [draw_seed(x) if p > 0 else None for p in ps]
        wide = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        outputs = ops.lora_linear_group(
            wide, ws, w_scales, biases, a_s, b_s, scales, ps, seeds, thresholds[0]
        )  # fmt: skip
        y, *others = outputs
        self.group.ahead[thread] = Ahead(x, _state(x), operands, dict(zip(list(operands)[1:], others, strict=True)))
        return y


def _pays(x: Tensor) -> bool:
    """Whether one op is faster: its backward is; a forward alone only where one read of x for all is to be saved."""
    return torch.is_grad_enabled() or (x.is_cuda and x.numel() > FEW_TOKENS * x.shape[-1])


def _state(x: Tensor) -> tuple:
    """What a layer's output depends on besides its operands, and whether it can be differentiated."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return x._version, torch.is_grad_enabled(), autocast


def _operands(member: Any, x: Tensor) -> tuple | None:
    """A member's operands, bias and threshold, where one op computes its next call; None otherwise."""
    adapter, bias = member.fused_adapter(), member._parameters["bias"]
    if adapter is None or (bias is not None and bias.requires_grad):
        return None
    operands = member.operands(adapter)
    w, w_scale, a, b, _, _ = operands
    if w_scale is None and w.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    for tensor in (w, a, b):
        if type(tensor) not in _PLAIN or tensor.device != x.device:
            return None
    return *operands, bias, member.threshold


def _fits(ahead: Ahead, place: int, member: Any, x: Tensor) -> bool:
    """Whether the member, called now with x, would compute what was computed ahead."""
    if x is not ahead.x or _state(x) != ahead.state:
        return False
    operands = _operands(member, x)
    if operands is None:
        return False
    for now, then in zip(operands, ahead.operands[place], strict=True):
        if now is not then and (isinstance(now, Tensor) or isinstance(then, Tensor) or now != then):
            return False
    return True
