"""What the tensors of a checkpoint are called, without a model to ask."""

from __future__ import annotations

from collections.abc import Iterable

LEADING = ("model.", "transformer.")  # what names of a bare model's checkpoint lack, and those of one with a head have
INPUTS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared"}
HEADS = {"lm_head", "embed_out", "output_projection", "decoder"}


def same_tensor(name: str, entries: Iterable[str]) -> list[str]:
    """What a tensor may be called in a checkpoint: names that have a leading part less or one more count too."""
    if name in entries:
        return [name]
    near = {lead + name for lead in LEADING} | {name.removeprefix(lead) for lead in LEADING}
    return sorted(near.intersection(entries))


def resolve(name: str, entries: Iterable[str], key: str) -> str:
    """The checkpoint's name of a tensor.

    Args:
        key: the adapter's name of what changes it, for the error.

    Raises:
        ValueError: there is no such tensor, or more than one.
    """
    found = same_tensor(name, entries)
    if len(found) == 1:
        return found[0]
    module, _, attribute = name.rpartition(".")
    hint = f"one of {found}, which is ambiguous" if found else "none"
    if not found and module.rpartition(".")[2] in HEADS | INPUTS:
        hint += "; it is tied to another tensor, which an adapter would then change too: untie the base first"
    if not found and attribute == "bias":
        hint += ", so there is no place for a trained bias"
    raise ValueError(f"{key}: expected a tensor {name!r} in the base, found {hint}")


def is_input(name: str) -> bool:
    """Whether a tensor belongs to an input embedding."""
    return name.split(".")[-2:-1] != [] and name.split(".")[-2] in INPUTS


def is_head(name: str) -> bool:
    """Whether a tensor is the weight of an output head."""
    return name.endswith(".weight") and name.split(".")[-2] in HEADS
