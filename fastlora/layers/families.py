"""Which layers of a model belong to one group: those that read the same tensor, known by their names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .group import Group, Kind, Seat
from .linear import LoraLinear

# Attributes of one parent, in the order in which it calls them.
FAMILIES = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"), ("linear_q", "linear_k", "linear_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"),
)  # fmt: skip

# Classes of transformers, of one release or another, that call the key and the value before the query.
QUERY_LAST = {
    "ConvBertSelfAttention", "DPTSelfAttention", "Dinov2SelfAttention", "Dinov2WithRegistersSelfAttention",
    "RadioSelfAttention", "RfDetrDinov2SelfAttention", "Tipsv2VisionSelfAttention", "VideoMAESelfAttention",
    "VitPoseBackboneSelfAttention", "YolosSelfAttention",
}  # fmt: skip

# Attention to another sequence: there the query reads another tensor than key and value.
CROSS_ATTENTION = re.compile(r"cross|encoder_att|encdec", re.IGNORECASE)


def form_groups(model: nn.Module) -> None:
    """Puts the LoRA layers of a model into groups; those that are in one already stay there or get a larger one."""
    kinds: dict[tuple, Kind] = {}
    for path, parent in model.named_modules():
        for family in FAMILIES:
            names = _in_order(family, parent, path)
            members = [parent._modules.get(name) for name in names]
            members = [member for member in members if isinstance(member, LoraLinear)]
            if len(members) > 1:
                key = type(parent), re.sub(r"\d+", "", path), names
                _form(parent, members, kinds.setdefault(key, Kind()))


def _in_order(family: tuple[str, ...], parent: nn.Module, path: str) -> tuple[str, ...]:
    """Those of a family that read the same tensor, in the order in which `parent` calls them."""
    if len(family) == 3 and CROSS_ATTENTION.search(path):
        return family[1:]
    return (*family[1:], family[0]) if len(family) == 3 and type(parent).__name__ in QUERY_LAST else family


def _form(parent: nn.Module, members: list[Any], kind: Kind) -> None:
    if all(member.seat is not None for member in members):
        return
    for member in members:
        _leave(member)
    group = Group(kind)
    opens, closes = group.open, group.close
    group.hooks = [parent.register_forward_pre_hook(opens), parent.register_forward_hook(closes, always_call=True)]
    for place, member in enumerate(members):
        member.seat = Seat(group, place, [] if place else members[1:])


def dissolve_groups(model: nn.Module) -> None:
    """Undoes `form_groups`."""
    for module in model.modules():
        _leave(module)


def _leave(module: nn.Module) -> None:
    seat = module.__dict__.pop("seat", None)
    if seat is not None:
        for hook in seat.group.hooks:
            hook.remove()
