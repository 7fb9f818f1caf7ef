"""The int8 formats that servers load: which tensors hold a weight `[N, K]`, and what config.json says of them.

pack-quantized, int-quantized   W ~ q * weight_scale            weight_scale [N, 1] in the model's dtype
bitsandbytes                    W ~ q * SCB[:, None] / 127      SCB float32 [N]

The first two are those of compressed-tensors, read by transformers and vLLM; with int-quantized the server quantises
the activations too, a scale per token (W8A8).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from .shards import DTYPES

INT8_MAX = 127
PER_WORD = 4  # int8 codes in an int32
COMPRESSED_TENSORS = "0.20.0"  # the release of compressed-tensors whose format is written
FLOAT32_UNIT = torch.finfo(torch.float32).eps / 2
FLOAT32_STEPS = 4  # the merge, the quotient by the scale, the product with it, and the difference that is looked at
BITSANDBYTES_THRESHOLD = 6.0  # the default of transformers: activations beyond it are multiplied in 16 bits

Specs = dict[str, tuple[str, tuple[int, ...]]]


class Int8Format(Protocol):
    """How a weight is stored in int8. Tensors are named by what comes after the module's name.

    Attributes:
        conv1d: whether transformers' Conv1D, a linear layer stored as `[K, N]`, can be in int8.
        experts: whether experts that are stored one by one can be, which transformers puts together when it loads them.
        patterns: whether layers to leave dense can be named by regular expressions that begin with "re:".
    """

    name: str
    conv1d: bool
    experts: bool
    patterns: bool

    def specs(self, N: int, K: int, dtype: str) -> Specs:
        """The stored tensors of a weight `[N, K]` of a model in `dtype`: their dtypes and shapes."""

    def constants(self, N: int, K: int) -> dict[str, Tensor]:
        """Those that do not depend on the values."""

    def quantize(self, rows: Tensor, dtype: str) -> dict[str, Tensor]:
        """Those of float32 rows, but for the constants."""

    def dequantize(self, stored: dict[str, Tensor], K: int) -> Tensor:
        """float32 rows from what `quantize` gave."""

    def bound(self, rows: Tensor, dtype: str) -> Tensor:
        """How far a stored value may be from that of float32 rows `[N, K]`: half the distance of two codes.

        The distance is `max |w| / 127`, with its own rounding; `FLOAT32_STEPS` roundings in float32 come on top.
        """

    def settings(self, dense: list[str]) -> dict[str, Any]:
        """The quantization_config where the linear layers of these names stay dense."""


class CompressedTensors:
    """int8 codes with a scale per output feature, packed four to an int32 or not."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed
        self.name = "pack-quantized" if packed else "int-quantized"
        self.conv1d, self.experts, self.patterns = False, packed, True

    def specs(self, N: int, K: int, dtype: str) -> Specs:
        if not self.packed:
            return {"weight": ("I8", (N, K)), "weight_scale": (dtype, (N, 1))}
        words = -(-K // PER_WORD)
        return {"weight_packed": ("I32", (N, words)), "weight_scale": (dtype, (N, 1)), "weight_shape": ("I64", (2,))}

    def constants(self, N: int, K: int) -> dict[str, Tensor]:
        return {"weight_shape": torch.tensor([N, K])} if self.packed else {}

    def quantize(self, rows: Tensor, dtype: str) -> dict[str, Tensor]:
        scale = row_scale(rows, DTYPES[dtype])
        # By the scale as it is stored, so that its rounding costs nothing.
        codes = (rows / scale.float()).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        return {
            "weight_packed" if self.packed else "weight": pack(codes) if self.packed else codes,
            "weight_scale": scale,
        }

    def dequantize(self, stored: dict[str, Tensor], K: int) -> Tensor:
        codes = unpack(stored["weight_packed"], K) if self.packed else stored["weight"]
        return codes.float().mul_(stored["weight_scale"].float())

    def bound(self, rows: Tensor, dtype: str) -> Tensor:
        limits = torch.finfo(DTYPES[dtype])
        widest = row_scale(rows, DTYPES[dtype]).float() * (1 + limits.eps)
        return widest / 2 + FLOAT32_STEPS * FLOAT32_UNIT * rows.abs()

    def settings(self, dense: list[str]) -> dict[str, Any]:
        shared = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
        activations = None if self.packed else shared | {"strategy": "token", "dynamic": True}
        return {
            "config_groups": {
                "group_0": {
                    "format": self.name,
                    "input_activations": activations,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": shared | {"strategy": "channel", "dynamic": False},
                }
            },
            "format": self.name,
            "global_compression_ratio": None,
            "ignore": dense,
            "kv_cache_scheme": None,
            "moe_sparsity_config": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": COMPRESSED_TENSORS,
        }


class BitsAndBytes:
    """The codes and scales of LLM.int8, which bitsandbytes makes from the weight in float16."""

    name = "bitsandbytes"
    conv1d, experts, patterns = True, False, False

    def specs(self, N: int, K: int, dtype: str) -> Specs:
        return {"weight": ("I8", (N, K)), "SCB": ("F32", (N,)), "weight_format": ("U8", ())}

    def constants(self, N: int, K: int) -> dict[str, Tensor]:
        return {"weight_format": torch.tensor(0, dtype=torch.uint8)}

    def quantize(self, rows: Tensor, dtype: str) -> dict[str, Tensor]:
        codes, scale = ops.quantize_rows(rows)
        # The absmax is a float16 value, which this gives back exactly.
        return {"weight": codes, "SCB": (scale * INT8_MAX).half().float()}

    def dequantize(self, stored: dict[str, Tensor], K: int) -> Tensor:
        return stored["weight"].float().mul_(stored["SCB"][:, None] / INT8_MAX)

    def bound(self, rows: Tensor, dtype: str) -> Tensor:
        limits = torch.finfo(torch.float16)
        widest = rows.abs().amax(dim=1, keepdim=True) / INT8_MAX * (1 + limits.eps) + limits.tiny * limits.eps
        # The codes are those of the weight in float16.
        return widest / 2 + (limits.eps / 2 + FLOAT32_STEPS * FLOAT32_UNIT) * rows.abs()

    def settings(self, dense: list[str]) -> dict[str, Any]:
        return {
            "_load_in_4bit": False,
            "_load_in_8bit": True,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": dense,
            "llm_int8_threshold": BITSANDBYTES_THRESHOLD,
            "load_in_4bit": False,
            "load_in_8bit": True,
            "quant_method": "bitsandbytes",
        }


def row_scale(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`max |w| / 127` per row of float32 `[N, K]`, as `[N, 1]` in `dtype`, such that no code is beyond 127.

    A row of zeros gets the dtype's epsilon, since readers divide by the scale.
    """
    absmax, limits = rows.abs().amax(dim=1, keepdim=True), torch.finfo(dtype)
    scale = (absmax / INT8_MAX).to(dtype).float()
    # Rounded down among the subnormal numbers, it would be too small by more than half a code.
    short = scale * (INT8_MAX + 0.5) < absmax
    scale = torch.where(short, scale + limits.tiny * limits.eps, scale)
    return torch.where(absmax > 0, scale, limits.eps).to(dtype)


def pack(codes: Tensor) -> Tensor:
    """int8 `[N, K]` as int32 `[N, ceil(K / 4)]`: codes + 128 from the lowest byte on, zeros where codes end."""
    unsigned = codes.view(torch.uint8) ^ 0x80  # adds 128
    rest = -codes.shape[1] % PER_WORD
    return F.pad(unsigned, (0, rest)).contiguous().view(torch.int32)


def unpack(words: Tensor, K: int) -> Tensor:
    """The int8 codes `[N, K]` that `pack` was given."""
    return (words.contiguous().view(torch.uint8)[:, :K] ^ 0x80).view(torch.int8)


INT8_FORMATS: dict[str, Int8Format] = {
    "int8": CompressedTensors(packed=True),
    "w8a8": CompressedTensors(packed=False),
    "bnb8": BitsAndBytes(),
}


def format_of(settings: dict[str, Any]) -> Int8Format | None:
    """The int8 format that a config.json names, None for a dense model.

    Raises:
        ValueError: it names another quantisation.
    """
    quantization = settings.get("quantization_config")
    if not quantization:
        return None
    method, layout = quantization.get("quant_method"), quantization.get("format")
    groups = quantization.get("config_groups") or {}
    strategies = {((group or {}).get("weights") or {}).get("strategy") for group in groups.values()}
    bits = {((group or {}).get("weights") or {}).get("num_bits") for group in groups.values()}
    for known in INT8_FORMATS.values():
        if isinstance(known, BitsAndBytes) and method == "bitsandbytes" and quantization.get("load_in_8bit"):
            return known
        if method == "compressed-tensors" and layout == known.name and (strategies, bits) == ({"channel"}, {8}):
            return known
    raise ValueError(
        f"quantization_config: expected one of {[known.name for known in INT8_FORMATS.values()]} with 8 bits per "
        f"channel, found {method!r} {layout or ''}"
    )
