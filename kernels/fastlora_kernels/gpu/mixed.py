"""`lora_linear_mixed` and its backward: the launches of one adapter, in which each token's own is taken (`owners`).

A tile of tokens multiplies by its own adapters alone, so a batch costs what one adapter would, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .checks import check_operands, check_rank
from .launch import device_arch, device_name
from .lora_linear import planned_expand
from .lora_linear_backward import planned_backward
from .owners import Owners, owners_of
from .plan import Plan, choose_plan
from .shrink import shrink


def lora_linear_mixed(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    rows: Tensor,
    ps: Sequence[float],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The contract is in `reference.lora_linear_mixed`. Ranks up to 256 each.

    Raises:
        ValueError, TypeError: as `lora_linear`.
    """
    check_operands(x, w, w_scale, None, None, bias=bias, seed=seed)
    _check_adapters(w, a, b, ranks, rows)
    owners = owners_of(rows, x.shape[0], ranks, scales, ps)
    plan = mixed_plan("forward", x, w, w_scale, owners)
    return planned_mixed(plan, x, w, w_scale, bias, a, b, owners, max(ps), seed)


def planned_mixed(
    plan: Plan, x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor,
    owners: Owners, p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`lora_linear_mixed` by a given plan of any kind; p is the largest probability."""
    s = shrink(x, a, p, seed, owners=owners)
    return planned_expand(plan, x, w, w_scale, bias, s, b, 1.0, owners), s


def lora_linear_mixed_backward(
    d_y: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    a: Tensor,
    b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    rows: Tensor,
    ps: Sequence[float],
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract is in `reference.lora_linear_mixed_backward`. Ranks up to 256 each; the same inputs, the same bits.

    Raises:
        ValueError, TypeError: as `lora_linear_backward`.
    """
    check_operands(x, w, w_scale, None, None, d_y=d_y, seed=seed)
    _check_adapters(w, a, b, ranks, rows)
    owners = owners_of(rows, d_y.shape[0], ranks, scales, ps)
    plan = mixed_plan("backward", d_y, w, w_scale, owners)
    needs = needs_x, needs_a, needs_b
    return planned_backward(plan, d_y, x, s, w, w_scale, a, b, 1.0, max(ps), seed, *needs, owners=owners)


def mixed_plan(op: str, x: Tensor, w: Tensor, w_scale: Tensor | None, owners: Owners) -> Plan:
    """That of one adapter whose s comes from a launch of its own, as it does with dropout; x is d_y in the backward."""
    size, dropout = (x.shape[0], *w.shape, max(owners.rank, owners.block_r)), 0.5
    return choose_plan(device_arch(x.device), x.dtype, *size, w_scale is not None, dropout, op, device_name(x.device))


def _check_adapters(w: Tensor, a: Tensor, b: Tensor, ranks: Sequence[int], rows: Tensor) -> None:
    for rank in ranks:
        check_rank(rank)
    (N, K), R = w.shape, sum(ranks)
    for name, tensor, shape in (("a", a, (R, K)), ("b", b, (N, R)), ("rows", rows, rows.shape[:1])):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
        if tensor.device != w.device:
            raise ValueError(f"{name}: expected device {w.device}, that of w, found {tensor.device}")
