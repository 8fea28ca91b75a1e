"""The 16-bit type in which tensors that are not quantized are stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch

NUMBERS_AT_ONCE = 1 << 22
"""Of a tensor that is too large to be converted as a whole: an embedding can be gigabytes."""


def to_storage(values: torch.Tensor) -> torch.Tensor:
    """Float values in float16, the type of the AWQ format; in bfloat16 beyond its range.

    A bfloat16 value of 6e-5 to 65504 is exact in float16, a smaller one is off by 3e-8 at most.
    Integers stay as they are.
    """
    return values.to(storage_dtype(values))


def storage_dtype(values: torch.Tensor) -> torch.dtype:
    """The type that ``to_storage`` gives."""
    if not values.is_floating_point():
        return values.dtype
    fits = all(bool(torch.isfinite(piece.half()).all()) for piece in in_pieces(values))
    return torch.float16 if fits else torch.bfloat16


def as_stored(values: torch.Tensor) -> torch.Tensor:
    """Float32 values as a reader of the checkpoint will see them."""
    return to_storage(values).float()


def in_pieces(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor in pieces along its first dimension, of some millions of numbers each."""
    if values.dim() == 0:
        yield values
        return
    rows = max(1, NUMBERS_AT_ONCE * len(values) // max(values.numel(), 1))
    yield from values.split(rows)
