"""EVA: A spans the directions in which a layer's inputs vary most, and ranks go where that explains most.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", section 3.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..models.targets import pattern_value
from .calibration import Batch, batches, counted_tokens, inputs_seen, token_mask, untouched
from .components import Components
from .target import Initial, Target, features

MAX_PASSES = 100  # over the calibration batches, after which components that still turn count as never settling


@torch.no_grad()
def eva(model: nn.Module, targets: list[Target], settings: dict[str, Any], calibration: Iterable) -> dict[str, Initial]:
    """A: the first right singular vectors of the target's inputs; B: zero; no adapter for a target that gets rank 0.

    The ranks of all targets together stay the same. Each goes to the component that explains the largest share of its
    inputs' variance, up to `rho` times a target's own rank. The batches are repeated until no component that is
    needed turns in a step by more than the angle of cosine `tau`. Targets with the same inputs share one decomposition.

    Raises:
        ValueError: a target is never called, no batch has as many tokens as components, or they never settle.
    """
    with untouched(model, training=False):
        source = batches(calibration, model)
        first = next(source)
        leaders = _leaders(model, targets, first, settings)
        limits = _limits(targets, leaders, settings["rho"])
        found = {name: Components(limits[name], settings["tau"]) for name in dict.fromkeys(leaders.values())}
        ranks = dict(limits)
        budget = sum(target.rank for target in targets)
        for number, batch in _repeated(chain([first], source)):
            moving = [t for t in targets if t.name in found and not found[t.name].settled(ranks[t.name])]
            if not moving:
                return {
                    t.name: _initial(t, found[leaders[t.name]], ranks[t.name], settings)
                    for t in targets
                    if ranks[t.name]
                }
            _observe(model, moving, batch, settings, lambda target, x: found[target.name].add(x))
            waiting = [name for name, components in found.items() if components.vectors is None]
            if waiting and number:
                name = waiting[0]
                raise ValueError(
                    f"calibration: expected a batch of at least {limits[name]} tokens for {name!r}, found none"
                )
            if not waiting:
                ranks = _shares(leaders, found, budget)
    raise ValueError(
        f"calibration: expected components that settle within {MAX_PASSES} passes, found that those of "
        f"{moving[0].name!r} still turn; give larger batches or a lower tau than {settings['tau']}"
    )


def with_found_ranks(
    config: LoraConfig, modules: dict[str, Any], initial: dict[str, Initial]
) -> tuple[LoraConfig, dict[str, Any]]:
    """The config and the modules after EVA gave out the ranks; as they were with any other method.

    With `adjust_scaling_factors`, alpha grows and shrinks with the rank.
    """
    if config.init_lora_weights != "eva":
        return config, modules
    assert config.eva_config is not None
    ranks, alphas = {}, {}
    for name, adapter in initial.items():
        wanted, rank = pattern_value(config.rank_pattern, name, config.r), adapter.a.shape[0]
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        if config.eva_config["adjust_scaling_factors"] and rank != wanted:
            alpha *= rank / wanted
        pattern = "^" + re.escape(name)  # matches no name that only ends in this one
        if rank != config.r:
            ranks[pattern] = rank
        if alpha != config.lora_alpha:
            alphas[pattern] = alpha
    targets = config.target_modules if len(initial) == len(modules) else list(initial)
    config = replace(config, rank_pattern=ranks, alpha_pattern=alphas, target_modules=targets)
    return config, {name: modules[name] for name in initial}


def _observe(model: nn.Module, targets: list[Target], batch: Batch, settings: dict[str, Any], see: Any) -> None:
    """Runs the model on a batch and shows `see` the inputs `[tokens, K]` of the targets."""
    mask = token_mask(batch, settings["label_mask_value"] if settings["use_label_mask"] else None)
    with inputs_seen(targets, lambda target, x: see(target, counted_tokens(x, mask))):
        model(**batch)


def _leaders(model: nn.Module, targets: list[Target], batch: Batch, settings: dict[str, Any]) -> dict[str, str]:
    """The first target with the same inputs, by target; those that lead come first."""
    inputs: dict[str, tuple] = {}

    def note(target: Target, x: Tensor) -> None:
        content = x.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        inputs.setdefault(target.name, (x.shape, hash(content)))

    _observe(model, targets, batch, settings, note)
    groups: dict[tuple, list[str]] = {}
    for target in targets:
        if target.name not in inputs:
            raise ValueError(f"calibration: expected batches that reach every target, found none at {target.name!r}")
        groups.setdefault(inputs[target.name], []).append(target.name)
    followers = {name: names[0] for names in groups.values() for name in names[1:]}
    return {names[0]: names[0] for names in groups.values()} | followers


def _limits(targets: list[Target], leaders: dict[str, str], rho: float) -> dict[str, int]:
    """How many components each target may get at most; the same for all with the same inputs."""
    largest: dict[str, int] = {}
    for target in targets:
        own, leader = min(round(target.rank * rho), features(target.module)[1]), leaders[target.name]
        largest[leader] = max(own, largest.get(leader, 0))
    return {name: largest[leader] for name, leader in leaders.items()}


def _shares(leaders: dict[str, str], found: dict[str, Components], budget: int) -> dict[str, int]:
    """The ranks by target: one for each of the `budget` components that explain most."""
    owners = [name for name, leader in leaders.items() for _ in found[leader].explained]
    explained = torch.cat([found[leader].explained.cpu() for leader in leaders.values()])
    counts = Counter(owners[i] for i in explained.argsort(descending=True)[:budget].tolist())
    ranks = {name: counts[name] for name in leaders}
    # Equal inputs explain equal shares: the one whose components are watched gets the higher rank.
    for name, leader in leaders.items():
        ranks[leader], ranks[name] = max(ranks[leader], ranks[name]), min(ranks[leader], ranks[name])
    return ranks


def _initial(target: Target, components: Components, rank: int, settings: dict[str, Any]) -> Initial:
    assert components.vectors is not None
    a = components.vectors[:rank]
    if settings["whiten"]:
        a = a / components.values[:rank].sqrt()[:, None]
    return Initial(a.float(), torch.zeros(features(target.module)[0], rank, device=a.device))


def _repeated(source: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """The batches again and again, each with the number of its pass."""
    kept = []
    for batch in source:
        kept.append(batch)
        yield 0, batch
    for number in range(1, MAX_PASSES):
        for batch in kept:
            yield number, batch
