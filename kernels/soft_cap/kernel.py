"""The soft cap in Triton."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.soft_cap.launch import BLOCK, NUM_WARPS, cap_grid


def soft_cap(x: torch.Tensor, cap: float, out: torch.Tensor) -> None:
    """Writes ``cap * tanh(x / cap)`` to ``out``."""
    num_rows, width = x.shape
    if not num_rows:
        return
    cap_kernel[cap_grid(num_rows, width)](
        x,
        out,
        cap,
        width,
        x.stride(0),
        out.stride(0),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


@triton.jit
def cap_kernel(x_ptr, out_ptr, cap, width, in_stride, out_stride, BLOCK: tl.constexpr):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * in_stride + columns, mask=mask, other=0.0).to(tl.float32)
    y = cap * _tanh(x / cap)
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tanh(z):
    """tanh to within 1e-6 of itself: by its series where 1 less an exponential would cancel."""
    square = z * z
    series = z * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    # exp(2 z) beyond 80 is infinite as far as 1 - 2 / (exp(2 z) + 1) can tell.
    by_exponential = 1.0 - 2.0 / (tl.exp(tl.minimum(2.0 * z, 80.0)) + 1.0)
    return tl.where(tl.abs(z) < 0.15, series, by_exponential)
