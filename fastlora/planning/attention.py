"""Attention of transformers models whose masks have no data.

A causal mask is not made where all tokens may be attended to, as kernels know causality themselves. Whether they may,
transformers reads from the mask or the positions, and assumes the worst where these cannot be read.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

NAME = "sdpa_without_padding"


def assume_no_padding(model: nn.Module) -> None:
    """Makes the fused attention of a transformers model take it that batches have no padding and are not packed."""
    switch = getattr(model, "set_attn_implementation", None)
    if switch is not None and getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa":
        _register()
        switch(NAME)


@functools.cache
def _register() -> None:
    """Under a name of its own, by the interface that transformers has for this."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*arguments: Any, **options: Any) -> Any:
        return sdpa_mask(*arguments, **options | {"allow_is_causal_skip": True})

    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(NAME, mask)
