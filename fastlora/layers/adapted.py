"""Weights with adapters in the place of the parameters that a module multiplies by itself.

A linear layer with an adapter computes `W x + s B (A x)`. A module whose weights are its own parameters, such as the
fused experts of a mixture or `nn.MultiheadAttention`, reads `self.weight` and multiplies by what it finds. It finds an
`AdaptedWeight` there, which stands for `W + s B A` and takes part in products without ever forming that sum.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fold import Fold

Term = tuple[Tensor, Tensor, float]  # L, R and s of `s L R`


class AdaptedWeight:
    """`W + sum of s L R`, with W `[..., M, N]`, L `[..., M, R]` and R `[..., R, N]`.

    Products distribute: `x (W + s L R) = x W + (x L) (s R)`, each by the function that was called. Anything else gets
    the sum. The factors are cast to the dtype of W; autograd keeps neither the sum nor its gradient.
    """

    def __init__(self, frozen: Tensor, terms: list[Term]) -> None:
        self.frozen, self.terms = frozen, terms

    @property
    def shape(self) -> torch.Size:
        return self.frozen.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen.dtype

    @property
    def device(self) -> torch.device:
        return self.frozen.device

    def dim(self) -> int:
        return self.frozen.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.frozen.size() if dim is None else self.frozen.size(dim)

    def dense(self) -> Tensor:
        """The sum, rounded once."""
        add = torch.addmm if self.frozen.dim() == 2 else torch.baddbmm
        weight = self.frozen
        with torch.autocast(weight.device.type, enabled=False):
            for left, right, scale in self.terms:
                weight = add(weight, left.to(weight.dtype), right.to(weight.dtype), alpha=scale)
        return weight

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """L and s R in the dtype of W."""
        return [(left.to(self.dtype), (scale * right).to(self.dtype).contiguous()) for left, right, scale in self.terms]

    def padded(self) -> AdaptedWeight:
        """The same with a rank of whole 16 bytes, which the rows of grouped products need."""
        multiple = 16 // self.frozen.element_size()
        terms = []
        for left, right, scale in self.terms:
            missing = -left.shape[-1] % multiple
            if missing:
                left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
            terms.append((left, right, scale))
        return AdaptedWeight(self.frozen, terms)

    def transpose(self, dim0: int, dim1: int) -> Any:
        if {dim0 % self.dim(), dim1 % self.dim()} != {self.dim() - 2, self.dim() - 1}:
            return self.dense().transpose(dim0, dim1)
        terms = [(right.transpose(-2, -1), left.transpose(-2, -1), scale) for left, right, scale in self.terms]
        return AdaptedWeight(self.frozen.transpose(-2, -1), terms)

    def __getitem__(self, index: Any) -> Any:
        """The weights of one expert or of several."""
        if self.dim() != 3 or not isinstance(index, (int, Tensor)) or (isinstance(index, Tensor) and index.dim() > 1):
            return self.dense()[index]
        terms = [(left[index], right[index], scale) for left, right, scale in self.terms]
        return AdaptedWeight(self.frozen[index], terms)

    def __len__(self) -> int:
        return self.frozen.shape[0]

    def __matmul__(self, other: Any) -> Any:
        operand: Any = self
        return torch.matmul(operand, other)

    def __getattr__(self, name: str) -> Any:
        """Any other attribute or method of a tensor is the sum's."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        product = PRODUCTS.get(_key(func))
        if product is None or not 2 <= len(args) <= (3 if product is _linear else 2):
            return func(*(_dense(arg) for arg in args), **{name: _dense(arg) for name, arg in kwargs.items()})
        return product(func, *args, **kwargs)


def _of_the_sum(name: str) -> Callable:
    return lambda self, *others: getattr(self.dense(), name)(*(_dense(other) for other in others))


# Python looks for operators in the class alone.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg"):
    setattr(AdaptedWeight, f"__{_name}__", _of_the_sum(f"__{_name}__"))


def folds_of(name: str, weight: Tensor, terms: list[Term]) -> list[Fold]:
    """What folding `W + sum of s L R` adds to the parameter of a name, one expert after the other."""
    result = []
    for index in range(len(weight)) if weight.dim() == 3 else [...]:
        parts = [(left.detach()[index], right.detach()[index], scale) for left, right, scale in terms]
        if len(parts) == 1:
            ((b, a, scale),) = parts
        else:
            b, a = torch.cat([scale * b for b, _, scale in parts], dim=1), torch.cat([a for _, a, _ in parts])
            scale = 1.0
        result.append(Fold(name, a, b, scale, view=operator.itemgetter(index)))
    return result


def _dense(value: Any) -> Any:
    """A value with the sum in the place of every adapted weight."""
    if isinstance(value, AdaptedWeight):
        return value.dense()
    return type(value)(_dense(item) for item in value) if type(value) in (list, tuple) else value


def _product(func: Callable, x: Any, w: Any, **options: Any) -> Tensor:
    """`x W` or, where only the first of the two is adapted, `W x`; `offs` bounds the groups of a grouped product."""
    if any(value is not None for name, value in options.items() if name != "offs"):
        return func(_dense(x), _dense(w), **options)
    if not isinstance(w, AdaptedWeight):
        y = func(x.frozen, w, **options)
        for left, right in x.factors():
            y = y + func(left, func(right, w, **options), **options)
        return y
    x = _dense(x)
    y = func(x, w.frozen, **options)
    for left, right in w.factors():
        y = y + func(func(x, left, **options), right, **options)
    return y


def _grouped_product(func: Callable, x: Any, w: Any, **options: Any) -> Tensor:
    """`x W` with an expert per group of rows."""
    x = _dense(x)
    return _product(func, x, w.padded(), **options) if isinstance(w, AdaptedWeight) else func(x, w, **options)


def _linear(func: Callable, x: Tensor, w: Any, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`."""
    if not isinstance(w, AdaptedWeight):
        return func(_dense(x), w, _dense(bias))
    y = func(x, w.frozen, bias)
    for left, right in w.factors():
        y = y + func(func(x, right), left)
    return y


@functools.cache
def teach_dynamo() -> None:
    """Makes a compiler see a grouped product in a form that `__torch_function__` is asked about.

    It is asked about public functions and about operators, but `F.grouped_mm` calls `torch._grouped_mm`.
    """

    def grouped_mm(mat_a, mat_b, *, offs=None, bias=None, out_dtype=None):  # type: ignore[no-untyped-def]
        return torch.ops.aten._grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)

    # Where there is a rule already, somebody else's or torch's own, it stands.
    with contextlib.suppress(ValueError):
        torch.compiler.substitute_in_graph(F.grouped_mm)(grouped_mm)


def _key(func: Any) -> Any:
    """A torch function, or the name of an operator that some library registered."""
    return getattr(func, "_qualified_op_name", func)


PRODUCTS: dict[Any, Callable] = {
    F.linear: _linear,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__), _product
    ),
    **dict.fromkeys(
        (F.grouped_mm, torch._grouped_mm, "aten::_grouped_mm", "transformers::grouped_mm_fallback"), _grouped_product
    ),
}  # fmt: skip
