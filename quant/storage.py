"""The 16-bit type in which tensors that are not quantized are stored."""

from __future__ import annotations

import torch


def to_storage(values: torch.Tensor) -> torch.Tensor:
    """Float values in float16, the type of the AWQ format; in bfloat16 beyond its range.

    A bfloat16 value of 6e-5 to 65504 is exact in float16, a smaller one is off by 3e-8 at most.
    Integers stay as they are.
    """
    if not values.is_floating_point():
        return values
    stored = values.to(torch.float16)
    return stored if bool(torch.isfinite(stored).all()) else values.to(torch.bfloat16)


def as_stored(values: torch.Tensor) -> torch.Tensor:
    """Float32 values as a reader of the checkpoint will see them."""
    return to_storage(values).float()
