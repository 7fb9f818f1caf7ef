"""What exporting and verifying find out about the tensors of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerError:
    """How far an int8 weight is from the merged one: the root mean square of the difference over that of the weight."""

    name: str
    relative_rms: float


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        format: what it was asked for.
        bytes: the size of the weights' files.
        errors: per int8 weight.
        perplexity: of the merged model and of the exported one, per token, where a text was given.
        notes: what was changed or left out on the way.
    """

    format: str
    bytes: int
    errors: tuple[LayerError, ...] = ()
    perplexity: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> LayerError | None:
        return max(self.errors, key=lambda error: error.relative_rms, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON has them, by the names of the attributes."""
        return asdict(self)


class Difference:
    """Sums of squares of a tensor and of its difference from another, block by block in any order, by any thread."""

    def __init__(self) -> None:
        self.sums: list[tuple[float, float]] = []

    def add(self, expected: Tensor, found: Tensor) -> None:
        self.sums.append((squared_norm(expected - found), squared_norm(expected)))

    @property
    def relative_rms(self) -> float:
        # fsum rounds once, so that the order of the blocks does not matter.
        difference, total = (math.fsum(sums) for sums in zip(*self.sums, strict=True)) if self.sums else (0.0, 0.0)
        return math.sqrt(difference / total) if total else math.sqrt(difference)


def squared_norm(values: Tensor) -> float:
    """The sum of the squares of float32 values; a row is summed in float32, the rows in float64."""
    return float(values.square().sum(dim=-1).double().sum())


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of the base in the merged checkpoint.

    Attributes:
        kind: "copied", "merged", "rounded" to another dtype, "int8", or "extra" where the base has none.
        error: the largest difference.
        share: the largest share of what rounding allows that a difference takes; above 1 it is wrong.
        relative_rms: the root mean square of the difference over that of the weight.
        problem: what is wrong, None where nothing is.
    """

    name: str
    kind: str
    error: float = 0.0
    share: float = 0.0
    relative_rms: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class Verification:
    """The checks of all tensors, in the order of the base's files.

    Attributes:
        format: "dense", or the int8 format.
    """

    format: str
    tensors: tuple[TensorCheck, ...]

    @property
    def problems(self) -> list[TensorCheck]:
        return [check for check in self.tensors if check.problem is not None]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> TensorCheck:
        """The tensor that is furthest off, in what rounding allows; one with a problem before those without."""
        return max(self.tensors, key=lambda check: (check.problem is not None, check.share))

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON has them: "ok", the name of the "worst" tensor, "format", and "tensors"; inf is null."""
        tensors = [{name: _finite(value) for name, value in asdict(check).items()} for check in self.tensors]
        return {"ok": self.ok, "worst": self.worst.name, "format": self.format, "tensors": tensors}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Comparison(Difference):
    """What is found beside what is expected and how far the two may be apart, block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.error = self.share = 0.0

    def add_bounded(self, expected: Tensor, found: Tensor, bound: Tensor) -> None:
        """Takes in rows of float32 values; whatever is not finite is wrong."""
        self.add(expected, found)
        difference = torch.nan_to_num((found - expected).abs(), nan=math.inf)
        shares = torch.where(difference > 0, difference / bound, 0.0)
        if shares.numel():
            self.error = max(self.error, float(difference.max()))
            self.share = max(self.share, float(shares.max()))

    def result(self, name: str, kind: str) -> TensorCheck:
        problem = None
        if self.share > 1:
            problem = (
                f"expected base + adapter, found values off by up to {self.error:.3g}, {self.share:.3g} x rounding"
            )
        return TensorCheck(name, kind, self.error, self.share, self.relative_rms, problem)
