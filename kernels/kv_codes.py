"""What the formats of the KV cache mean: floats to codes, scales and offsets, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qserve.kernels.hadamard import rotate
from qserve.kernels.kv_cache import SCALE_DTYPE, KvFormat

FLOAT8_MAX = 448.0
INT8_MAX = 127.0
INT4_MAX = 15.0
SMALLEST_SCALE = torch.finfo(SCALE_DTYPE).smallest_normal
"""No scale is below it, and none is 0: a head of zeros can be divided by its scale."""


class KvCodes(NamedTuple):
    """Rows as they lie in a cache: codes ``[..., row_size]``, float16 scales and offsets ``[...]``
    where the format has them."""

    codes: torch.Tensor
    scales: torch.Tensor | None = None
    offsets: torch.Tensor | None = None


def encode(x: torch.Tensor, format: KvFormat) -> KvCodes:
    """The codes of heads ``x [..., D]``, each rounded to nearest even with the scale and the offset
    as stored. A NaN makes its head's scale NaN; what float16 cannot hold is infinite."""
    x = x.float()
    if not format.has_scales:
        return KvCodes(x.to(format.dtype))
    if format is KvFormat.INT4:
        return _encode_int4(rotate(x))
    largest = FLOAT8_MAX if format is KvFormat.FLOAT8 else INT8_MAX
    scales = _store_scale(x.abs().amax(-1) / largest)
    scaled = (x / scales.float()[..., None]).nan_to_num(0.0).clamp(-largest, largest)
    if format is KvFormat.INT8:
        scaled = scaled.round()
    return KvCodes(scaled.to(format.dtype), scales)


def decode(rows: KvCodes, format: KvFormat) -> torch.Tensor:
    """The heads that ``rows`` stand for: float32 ``[..., D]``."""
    codes, scales, offsets = rows
    if format is KvFormat.INT4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    x = codes.float()
    if scales is not None:
        x = x * scales.float()[..., None]
    if offsets is not None:
        x = x + offsets.float()[..., None]
    return rotate(x) if format is KvFormat.INT4 else x


def _encode_int4(x: torch.Tensor) -> KvCodes:
    low, high = x.aminmax(dim=-1)
    scales, offsets = _store_scale((high - low) / INT4_MAX), low.to(SCALE_DTYPE)
    steps = (x - offsets.float()[..., None]) / scales.float()[..., None]
    codes = steps.nan_to_num(0.0).round().clamp(0, INT4_MAX).byte()
    first, second = codes.chunk(2, dim=-1)
    return KvCodes(first | second << 4, scales, offsets)


def _store_scale(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(min=SMALLEST_SCALE).to(SCALE_DTYPE)
