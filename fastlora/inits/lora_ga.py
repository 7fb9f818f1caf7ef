"""LoRA-GA: the first step of the adapter goes where full fine-tuning would go (Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import batches, untouched
from .target import Initial, Target, draw, features, moved_into_adapter, rounded


def gradients(model: nn.Module, targets: list[Target], calibration: Iterable) -> dict[str, Tensor]:
    """The mean over the batches of the loss's gradient with respect to the weight `[N, K]` of every target.

    The model is in training mode meanwhile, and no other parameter gets a gradient.

    Raises:
        ValueError: there is no loss, or a target gets no gradient or one that is not finite.
    """
    count = 0
    with untouched(model, training=True), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for target in targets:
            target.module.weight.requires_grad_(True).grad = None
        for batch in batches(calibration, model):
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                raise ValueError("calibration: expected batches with labels, found that the model's output has no loss")
            loss.backward()
            count += 1
        return {target.name: _mean_gradient(target, count) for target in targets}


def _mean_gradient(target: Target, count: int) -> Tensor:
    found = target.module.weight.grad
    if found is None or not torch.isfinite(found).all():
        what = "none" if found is None else "inf or nan"
        raise ValueError(f"calibration: expected a finite gradient at every target, found {what} at {target.name!r}")
    mean = found / count
    return mean if isinstance(target.module, nn.Linear) else mean.T


@torch.no_grad()
def lora_ga(target: Target, settings: dict[str, Any], gradient: Tensor) -> Initial:
    """A and B from singular vectors of the gradient `G = U S V^T`; the frozen weight loses `scaling * B A`.

    `direction` says which of the first 2 R vectors each takes: "ArB2r" (A the first R, B the next), "A2rBr" (the
    other way round), "ArBr" (in turn), "random" (both the same R, at random). Then `A = V^T` and `B = U S`, times a
    factor by `scale`: "stable" (B by `N^(1/4) / sqrt(stable_gamma)`), "weight_svd" (B so that its largest singular
    value is the weight's), "gd_scale" (both by `1 / scaling`) or "unit" (LoRA-GA, section 3.3, as PEFT has it).
    PEFT takes K for N where a `Conv1D` stores its weight transposed; here it is N.
    """
    draw(target)
    weight, rank = target.dense(), target.rank
    gradient = gradient.to(weight.dtype)
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
    for_a, for_b = _vectors(settings["direction"], rank)
    a, b = v.T[for_a], u[:, for_b] * s[for_b]
    if settings["scale"] == "stable":
        b = b * (features(target.module)[0] ** 0.25 / settings["stable_gamma"] ** 0.5)
    elif settings["scale"] == "weight_svd":
        _, values, _ = torch.svd_lowrank(weight, q=rank, niter=4)
        largest = s[for_b][0]
        b = b * (values[0] / largest) if largest > 0 else b
    elif settings["scale"] == "gd_scale":
        a, b = a / target.scaling, b / target.scaling
    # The adapter is rounded first, so that the frozen weight loses what is really in it.
    a, b = rounded(target, a, b)
    return moved_into_adapter(target, weight, a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous())


def _vectors(direction: str, rank: int) -> tuple[Tensor, Tensor]:
    """The indices of A's vectors and of B's."""
    first, second = torch.arange(rank), torch.arange(rank, 2 * rank)
    if direction == "ArB2r":
        return first, second
    if direction == "A2rBr":
        return second, first
    if direction == "ArBr":
        return torch.arange(1, 2 * rank, 2), torch.arange(0, 2 * rank, 2)
    chosen = torch.randperm(2 * rank)[:rank]
    return chosen, chosen
