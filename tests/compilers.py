"""What this torch compiles, and computes alike when it has."""

from collections.abc import Callable
from typing import Any

import torch
from accuracy import assert_as_accurate_as_eager
from torch import Tensor


def compiles(plain: Any, run: Callable[[Any], Tensor]) -> bool:
    """Whether this torch compiles a plain model and its backward: of some kinds it compiles none.

    Args:
        run: the model's output, for the model or a compiled form of it.
    """
    torch.compiler.reset()
    try:
        run(torch.compile(plain, fullgraph=True, backend="aot_eager")).square().mean().backward()
    except (torch._dynamo.exc.BackendCompilerFailed, torch._dynamo.exc.Unsupported):
        return False
    finally:
        torch.compiler.reset()
    return True


def assert_all_as_accurate(actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Holds tensors by name to the error of eager. Under autocast a compiled model need not have eager's bits."""
    assert actual.keys() == eager.keys() == exact.keys()
    for name, value in exact.items():
        assert_as_accurate_as_eager(actual[name], eager[name], value, name)
