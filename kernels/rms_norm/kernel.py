"""The root-mean-square norm in Triton, rounded to int8 or not."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.rms_norm.launch import NormProblem, norm_launch

# Adding it to a number below 2 ** 22 leaves the nearest integer, ties to even, in the low bits.
_ROUND = tl.constexpr(12582912.0)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    weight_offset: float,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Writes the norm of ``x``, or of ``residual + x`` which replaces ``residual``, to ``out``.

    With float32 ``scales [rows]``, ``out`` is int8: see ``rms_norm_int8``.
    """
    problem = NormProblem(x.shape[0], x.shape[1], residual is not None, scales is not None)
    launch = norm_launch(problem)
    if not problem.num_rows:
        return
    norm_kernel[launch.grid](
        x,
        residual,
        weight,
        out,
        scales,
        eps,
        weight_offset,
        problem.width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        BLOCK=launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, scale_ptr, eps, weight_offset, width,
    x_stride, residual_stride, out_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. The residual and the scales may be None."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = load_row(x_ptr, residual_ptr, row, columns, mask, x_stride, residual_stride)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y = x * inverse * (weight + weight_offset)
    if scale_ptr is not None:
        largest = tl.max(tl.abs(y), 0)
        factor = 127.0 / tl.where(largest > 0, largest, float("inf"))
        y = (tl.minimum(tl.maximum(y * factor, -127.0), 127.0) + _ROUND) - _ROUND
        tl.store(scale_ptr + row, largest / 127.0)
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_row(x_ptr, residual_ptr, row, columns, mask, x_stride, residual_stride):
    """A row of ``x`` in float32, or of ``residual + x``, which is rounded and written back."""
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row * residual_stride + columns
        residual = tl.load(residual_ptrs, mask=mask, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptrs, x, mask=mask)
    return x.to(tl.float32)
