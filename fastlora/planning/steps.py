"""The memory of a training step, from running one on tensors that have shapes and no data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..layers import is_linear4bit
from ..prepare import checkpointing_switch
from .attention import assume_no_padding
from .layers import find_repeated, only
from .live import LiveBytes
from .operators import GroupedProducts


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside weights, gradients of weights and optimiser.

    Attributes:
        kept: alive when the forward has ended, for the backward.
        peak: the most alive at any moment of forward and backward.
    """

    kept: int
    peak: int

    def __add__(self, other: StepMemory) -> StepMemory:
        return StepMemory(self.kept + other.kept, self.peak + other.peak)

    def __sub__(self, other: StepMemory) -> StepMemory:
        return StepMemory(self.kept - other.kept, self.peak - other.peak)

    def __mul__(self, times: int) -> StepMemory:
        return StepMemory(self.kept * times, self.peak * times)


def step_memory(model: Any, batch: int, length: int, checkpointing: bool, whole: bool = False) -> StepMemory:
    """The memory of one training step of a model on the meta device, which this changes for good.

    The step runs with as few layers as tell the kinds of layers apart, then with one more of each kind: what that
    adds, every further layer adds too.

    Args:
        batch, length: rows and tokens per row.
        checkpointing: whether the layers' activations are recomputed in the backward.
        whole: run all layers instead.

    Raises:
        ValueError: the model cannot be checkpointed, or is none of transformers for texts or images. Its own forward
            may raise anything else.
    """
    if not hasattr(model, "config"):
        raise ValueError(f"model: expected one of transformers, found {type(model).__name__}")
    if any(is_linear4bit(module) for module in model.modules()):
        raise ValueError("model: expected no layers in 4 bits, which bitsandbytes computes with data alone, found some")
    if checkpointing:
        getattr(model, f"{checkpointing_switch(model)}_enable")({"use_reentrant": False})
    model.config.use_cache = False
    assume_no_padding(model)
    model.train()
    step = _Step(model, batch, length)
    repeated = [] if whole else find_repeated(model)
    few = {layers.path: sorted([0, *(kind[0] for kind in layers.kinds)]) for layers in repeated}
    least = step.run(few)
    total = least
    for layers in repeated:
        for kind in layers.kinds:
            if len(kind) > 1:
                more = few | {layers.path: sorted([*few[layers.path], kind[1]])}
                total = total + (step.run(more) - least) * (len(kind) - 1)
    return total


@dataclass(frozen=True)
class _Step:
    model: Any
    batch: int
    length: int
    mode: FakeTensorMode = field(default_factory=FakeTensorMode)
    fakes: dict[int, Tensor] = field(default_factory=dict)  # by the identity of what they replaced, and of themselves
    originals: list[Tensor] = field(default_factory=list)

    def run(self, kept: dict[str, list[int]]) -> StepMemory:
        """A forward and a backward with some layers of the model's lists."""
        live = LiveBytes()
        with only(self.model, kept), self.mode, GroupedProducts(), _quiet():
            tensors = self._replace_tensors()
            with live:
                live.ignore(*tensors)
                loss = self._loss()
                kept_bytes = live.now
                loss.backward()
        return StepMemory(kept_bytes, live.peak)

    def _replace_tensors(self) -> list[Tensor]:
        """Puts tensors that say they are on the CPU in the place of those on the meta device; returns all in use.

        Attention picks its algorithm by the device; on the meta device it would be the one that keeps every
        probability.
        """
        used: list[Tensor] = []
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in self.fakes:
                            self._add(tensor)
                        fake = tensors[name] = self.fakes[id(tensor)]
                        used += [fake] if fake.grad is None else [fake, fake.grad]
        return used

    def _add(self, tensor: Tensor) -> None:
        fake = _fake(tensor)
        # The original stays alive too, as its identity is the key.
        self.originals.append(tensor)
        self.fakes[id(tensor)] = self.fakes[id(fake)] = fake

    def _loss(self) -> Tensor:
        inputs = example_inputs(self.model, self.batch, self.length)
        output = self.model(**inputs)
        loss = getattr(output, "loss", None)
        return output[0].float().mean() if loss is None else loss


def example_inputs(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Arguments of a transformers model with labels for its loss, all zeros.

    Raises:
        ValueError: the model takes neither token ids nor pixels.
    """
    main, config = getattr(model, "main_input_name", "input_ids"), model.config
    if main == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros(batch, getattr(config, "num_channels", 3), height, width, dtype=model.dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long)}
    if main != "input_ids":
        raise ValueError(f"model: expected one of texts or images, found one of {main}")
    ids = torch.zeros(batch, length, dtype=torch.long)
    name = type(model).__name__
    if "Classification" in name and "Token" not in name:
        return {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.long)}
    return {"input_ids": ids, "labels": ids.clone()} if "For" in name else {"input_ids": ids}


def _fake(tensor: Tensor) -> Tensor:
    """A tensor like another, with a gradient beside it where it trains."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        return fake
    parameter = nn.Parameter(fake, requires_grad=tensor.requires_grad)
    if tensor.requires_grad:
        parameter.grad = torch.empty_like(fake)
    return parameter


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers has to say to a model that nobody trains."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
