"""The memory of optimisers' states."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

STEP = 4  # bytes of the count that PyTorch's optimisers keep per tensor
MIN_QUANTIZED, BLOCK = 4096, 256  # bitsandbytes quantises the states of tensors from this size on, in these blocks


def _adamw(parameter: Tensor) -> int:
    return 2 * parameter.nbytes + STEP


def _adafactor(parameter: Tensor) -> int:
    """A row and a column of second moments (Shazeer and Stern 2018, section 3), in the dtype of the parameter."""
    if parameter.dim() < 2:
        return parameter.nbytes + STEP
    rows, columns = parameter.numel() // parameter.shape[-1], parameter.numel() // parameter.shape[-2]
    return (rows + columns) * parameter.element_size() + STEP


def _adamw_8bit(parameter: Tensor) -> int:
    """Two codes of 8 bits and their scales (Dettmers et al. 2022, section 2); small tensors stay in float32."""
    size = parameter.numel()
    return 8 * size if size < MIN_QUANTIZED else 2 * (size + 4 * -(-size // BLOCK))


OPTIMIZERS: dict[str, Callable[[Tensor], int]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": lambda parameter: 0,
}


def state_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Bytes of an optimiser's state for parameters that train.

    Raises:
        ValueError: the optimiser is unknown.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, found {name!r}")
    return sum(OPTIMIZERS[name](parameter) for parameter in parameters)
