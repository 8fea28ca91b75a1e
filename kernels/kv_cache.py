"""The keys and values of one layer, in blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from qserve.kernels import native

CACHE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Paged storage of one layer: ``k`` and ``v`` are ``[num_blocks, num_kv_heads, block_size,
    head_dim]``.

    The token in slot ``s`` lies in block ``s // block_size`` at offset ``s % block_size``. Both
    tensors are contiguous and float16, bfloat16 or float32. Raises ``ValueError`` for shapes and
    ``TypeError`` for dtypes that do not fit.
    """

    k: torch.Tensor
    v: torch.Tensor
    handle: Any = field(init=False, repr=False, compare=False)
    """What the native kernels know the cache by; None where they do not run."""

    def __post_init__(self) -> None:
        if self.k.dim() != 4 or self.k.shape != self.v.shape:
            raise ValueError(
                f"k {tuple(self.k.shape)} and v {tuple(self.v.shape)}: expected two tensors "
                "[num_blocks, num_kv_heads, block_size, head_dim]"
            )
        if self.k.dtype not in CACHE_DTYPES or self.v.dtype is not self.k.dtype:
            raise TypeError(
                f"k is {self.k.dtype} and v {self.v.dtype}: expected float16, bfloat16 or float32"
            )
        if not (self.k.is_contiguous() and self.v.is_contiguous()):
            raise ValueError("k and v must be contiguous: allocate them with torch.zeros")
        usable = native.available() and self.k.is_cpu and self.v.is_cpu
        object.__setattr__(self, "handle", self._open() if usable else None)

    def _open(self) -> Any:
        return native.extension().LayerCache(
            self.k.data_ptr(), self.v.data_ptr(), *self.k.shape, native.float_type(self.k.dtype)
        )

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
        return self.k.size(3)
