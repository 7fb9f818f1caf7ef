"""The header of a safetensors file that is written a piece at a time, and where in the file each tensor goes.

Tensors stand in the order of their element sizes, widest first, so that each is aligned, as the format's own writer
has them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from .int8 import Specs
from .plan import ALIGNMENT

ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Layout:
    """One file to write.

    Attributes:
        header: its first bytes.
        places: where each tensor begins.
        size: of the whole file, in bytes.
    """

    header: bytes
    places: dict[str, int]
    size: int


def lay_out(specs: Specs) -> Layout:
    """The layout of a file with these tensors. Dtypes that are not in `ITEM_BYTES` have one byte an element."""
    values: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: -ITEM_BYTES.get(item[1][0], 1)):
        places[name] = end
        end += size_of(spec)
        values[name] = {"dtype": spec[0], "shape": list(spec[1]), "data_offsets": [places[name], end]}
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {name: len(header) + place for name, place in places.items()}, len(header) + end)


def size_of(spec: tuple[str, tuple[int, ...]]) -> int:
    """The bytes of a tensor of this dtype and shape."""
    return math.prod(spec[1]) * ITEM_BYTES.get(spec[0], 1)


def index_of(files: dict[str, Specs], parameters: int) -> bytes:
    """The text of the index of files.

    Args:
        files: their tensors by name.
        parameters: how many the model has, whatever the tensors are stored in.
    """
    size = sum(size_of(spec) for specs in files.values() for spec in specs.values())
    values = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": {name: file for file, specs in files.items() for name in specs},
    }
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
