"""The header of a safetensors file that is written a piece at a time, and where in the file each tensor goes.

Tensors stand in the order of their element sizes, widest first, so that each is aligned, as the format's own writer
has them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, BinaryIO

from torch import Tensor

from .int8 import Specs
from .shards import INDEX_FILE, Shard, write_tensor

ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
ALIGNMENT = 8  # bytes


@dataclass
class Layout:
    """One file to write.

    Attributes:
        header: its first bytes.
        places: where the next bytes of each tensor go.
        size: of the whole file, in bytes.
    """

    header: bytes
    places: dict[str, int]
    size: int

    def write(self, output: BinaryIO, name: str, part: Tensor) -> int:
        """Writes the next part of a tensor, and returns its bytes."""
        output.seek(self.places[name])
        written = write_tensor(output, part)
        self.places[name] += written
        return written


def lay_out(specs: Specs) -> Layout:
    """The layout of a file with these tensors. Dtypes that are not in `ITEM_BYTES` have one byte an element."""
    values: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -ITEM_BYTES.get(item[1][0], 1)):
        places[name] = end
        end += math.prod(shape) * ITEM_BYTES.get(dtype, 1)
        values[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [places[name], end]}
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {name: len(header) + place for name, place in places.items()}, len(header) + end)


def index_of(files: dict[str, Specs], shards: list[Shard]) -> dict[str, bytes]:
    """The index of files, by its name, where the checkpoint had one.

    Its sizes are those of the new tensors, its number of parameters that of the model.
    """
    if not (shards[0].path.parent / INDEX_FILE).is_file():
        return {}
    sizes = [math.prod(shape) * ITEM_BYTES.get(dtype, 1) for specs in files.values() for dtype, shape in specs.values()]
    parameters = sum(math.prod(entry.shape) for shard in shards for entry in shard.entries)
    values = {
        "metadata": {"total_parameters": parameters, "total_size": sum(sizes)},
        "weight_map": {name: file for file, specs in sorted(files.items()) for name in sorted(specs)},
    }
    return {INDEX_FILE: (json.dumps(values, indent=2) + "\n").encode()}
