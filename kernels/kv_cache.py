"""The keys and values of one layer, in blocks of tokens, in one of six formats."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from qserve.kernels import native


class KvFormat(Enum):
    """How a key or value is kept. The last three have a scale for each token and head.

    FLOAT8: e4m3, scale = largest magnitude / 448. INT8: codes -127..127, scale = largest magnitude
    / 127. INT4: codes 0..15 of the head rotated by ``hadamard.rotate``, with an offset beside the
    scale.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that hold the codes; no two formats have the same."""
        return _DTYPES[self]

    @property
    def has_scales(self) -> bool:
        return self in (KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4)

    @property
    def has_offsets(self) -> bool:
        return self is KvFormat.INT4

    def row_size(self, head_dim: int) -> int:
        """Elements of a row of codes: ``head_dim``, or half of it where a byte holds two."""
        return head_dim // 2 if self is KvFormat.INT4 else head_dim

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of the key, or the value, of one token and head, its scale and offset included."""
        numbers = self.has_scales + self.has_offsets
        return self.row_size(head_dim) * self.dtype.itemsize + numbers * SCALE_DTYPE.itemsize


_DTYPES = {
    KvFormat.FLOAT32: torch.float32,
    KvFormat.FLOAT16: torch.float16,
    KvFormat.BFLOAT16: torch.bfloat16,
    KvFormat.FLOAT8: torch.float8_e4m3fn,
    KvFormat.INT8: torch.int8,
    KvFormat.INT4: torch.uint8,
}
_FORMATS = {dtype: format for format, dtype in _DTYPES.items()}
SCALE_DTYPE = torch.float16


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Paged storage of one layer: ``k`` and ``v`` are ``[num_blocks, num_kv_heads, block_size,
    head_dim]`` in the dtype of ``format``; for INT4 ``[..., head_dim / 2]``, where byte ``j`` holds
    element ``j`` in its low half and element ``j + head_dim / 2`` in its high half.

    The token in slot ``s`` lies in block ``s // block_size`` at offset ``s % block_size``. Scales
    and offsets are float16 ``[num_blocks, num_kv_heads, block_size]``, present where the format has
    them: an element is ``scale * code + offset``. All tensors are contiguous. Raises ``ValueError``
    for shapes and ``TypeError`` for dtypes that do not fit.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None
    k_offsets: torch.Tensor | None = None
    v_offsets: torch.Tensor | None = None
    format: KvFormat = field(init=False)
    handle: Any = field(init=False, repr=False, compare=False)
    """What the native kernels know the cache by; None where they do not run."""

    def __post_init__(self) -> None:
        if self.k.dim() != 4 or self.k.shape != self.v.shape:
            raise ValueError(
                f"k {tuple(self.k.shape)} and v {tuple(self.v.shape)}: expected two tensors "
                "[num_blocks, num_kv_heads, block_size, head_dim]"
            )
        if self.k.dtype not in _FORMATS or self.v.dtype is not self.k.dtype:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FORMATS)
            raise TypeError(f"k is {self.k.dtype} and v {self.v.dtype}: expected one of {known}")
        if not (self.k.is_contiguous() and self.v.is_contiguous()):
            raise ValueError("k and v must be contiguous: use LayerCache.allocate")
        object.__setattr__(self, "format", _FORMATS[self.k.dtype])
        for name in ("k_scales", "v_scales"):
            self._check_numbers(name, self.format.has_scales)
        for name in ("k_offsets", "v_offsets"):
            self._check_numbers(name, self.format.has_offsets)
        usable = native.available() and self.k.is_cpu and self.v.is_cpu
        object.__setattr__(self, "handle", self._open() if usable else None)

    @classmethod
    def allocate(
        cls,
        format: KvFormat,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> LayerCache:
        """A cache of zeros. On a CPU the system gives the memory when a block is first used.

        Raises ``ValueError`` for an odd ``head_dim`` where a byte holds two elements.
        """
        if format is KvFormat.INT4 and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}: a 4-bit cache needs an even one")
        tokens = (num_blocks, num_kv_heads, block_size)
        rows = (*tokens, format.row_size(head_dim))
        tensors = [_zeros(rows, format.dtype, device) for _ in range(2)]
        for _ in range(2 * (format.has_scales + format.has_offsets)):
            tensors.append(_zeros(tokens, SCALE_DTYPE, device))
        return cls(*tensors)

    @property
    def num_blocks(self) -> int:
        return self.k.size(0)

    @property
    def num_kv_heads(self) -> int:
        return self.k.size(1)

    @property
    def block_size(self) -> int:
        return self.k.size(2)

    @property
    def head_dim(self) -> int:
        return self.k.size(3) * (2 if self.format is KvFormat.INT4 else 1)

    def _check_numbers(self, name: str, wanted: bool) -> None:
        numbers: torch.Tensor | None = getattr(self, name)
        if (numbers is not None) != wanted:
            verb = "needs" if wanted else "has no"
            raise ValueError(f"a cache of {self.format.value} {verb} {name}")
        if numbers is None:
            return
        if numbers.dtype is not SCALE_DTYPE:
            raise TypeError(f"{name} is {numbers.dtype}, expected float16")
        if numbers.shape != self.k.shape[:3] or not numbers.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(numbers.shape)}, expected {tuple(self.k.shape[:3])}, "
                "contiguous"
            )

    def _open(self) -> Any:
        extension = native.extension()
        sides = (
            extension.CacheSide(*(0 if part is None else part.data_ptr() for part in parts))
            for parts in (
                (self.k, self.k_scales, self.k_offsets),
                (self.v, self.v_scales, self.v_offsets),
            )
        )
        format = getattr(extension.KvFormat, self.format.name)
        return extension.LayerCache(*sides, *self.k.shape[:3], self.head_dim, format)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.zeros`` writes its zeros on a CPU, and so takes the memory of the whole cache."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize))
    return (
        torch.frombuffer(pages, dtype=torch.uint8, count=math.prod(shape) * dtype.itemsize)
        .view(dtype)
        .view(shape)
    )
