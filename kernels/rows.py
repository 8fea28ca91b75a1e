"""Checks of the row-major matrices that every op takes and gives.

They run for every call of every op, some hundred times a token: what is right is seen with the
fewest questions to the tensor (each costs 50 to 150 ns), and only what is wrong is looked at twice.
"""

from __future__ import annotations

import torch


def check_rows(name: str, x: torch.Tensor, width: int) -> None:
    """Raises unless ``x`` is ``[rows, width]`` with contiguous rows, and float32 where it is on the
    CPU.

    Rows may lie apart (a slice of a wider matrix). Raises ``ValueError`` for the shape or the
    strides and ``TypeError`` for the dtype.
    """
    shape = x.shape
    fits = len(shape) == 2 and shape[1] == width
    if fits and x.dtype is torch.float32 and (x.is_contiguous() or x.stride()[1] == 1):
        return
    _refuse(name, x, width)


def check_output(x: torch.Tensor, width: int, out: torch.Tensor | None) -> torch.Tensor:
    """``out``, found to be ``[x.size(0), width]`` with contiguous rows, or a new matrix like ``x``
    of that shape."""
    if out is None:
        return x.new_empty(x.shape[0], width)
    fits = out.shape == (x.shape[0], width) and out.dtype is x.dtype
    if fits and (out.is_contiguous() or out.stride()[1] == 1):
        return out
    _refuse("out", out, width)
    if out.size(0) != x.size(0) or out.dtype is not x.dtype:
        raise ValueError(
            f"out is {out.dtype} with {out.size(0)} rows, expected {x.dtype} with {x.size(0)}"
        )
    return out


def _refuse(name: str, x: torch.Tensor, width: int) -> None:
    if x.dim() != 2 or x.size(1) != width:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [rows, {width}]")
    if x.stride(1) != 1 and width > 1:
        raise ValueError(f"{name} has strides {x.stride()}, expected contiguous rows")
    if x.is_cpu and x.dtype is not torch.float32:
        raise TypeError(f"{name} is {x.dtype} on a CPU, expected float32")
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}, expected a floating-point dtype")
