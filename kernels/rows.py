"""Checks of the row-major matrices that every op takes and gives."""

from __future__ import annotations

import torch


def check_rows(name: str, x: torch.Tensor, width: int) -> None:
    """Raises unless ``x`` is ``[rows, width]`` with contiguous rows, and float32 where it is on the
    CPU.

    Rows may lie apart (a slice of a wider matrix). Raises ``ValueError`` for the shape or the
    strides and ``TypeError`` for the dtype.
    """
    if x.dim() != 2 or x.size(1) != width:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [rows, {width}]")
    if x.stride(1) != 1 and width > 1:
        raise ValueError(f"{name} has strides {x.stride()}, expected contiguous rows")
    if x.dtype is not torch.float32 and (x.is_cpu or not x.is_floating_point()):
        raise TypeError(f"{name} is {x.dtype} on {x.device.type}, expected float32 on a CPU")


def check_output(x: torch.Tensor, width: int, out: torch.Tensor | None) -> torch.Tensor:
    """``out``, found to be ``[x.size(0), width]`` with contiguous rows, or a new matrix like ``x``
    of that shape."""
    if out is None:
        return x.new_empty(x.size(0), width)
    check_rows("out", out, width)
    if out.size(0) != x.size(0) or out.dtype is not x.dtype:
        raise ValueError(
            f"out is {out.dtype} with {out.size(0)} rows, expected {x.dtype} with {x.size(0)}"
        )
    return out
