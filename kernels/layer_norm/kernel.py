"""Layer norm in Triton."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.rms_norm.kernel import load_row
from qserve.kernels.rms_norm.launch import NormProblem, norm_launch


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes the norm of ``x``, or of ``residual + x`` which replaces ``residual``, to ``out``."""
    problem = NormProblem(x.shape[0], x.shape[1], residual is not None)
    launch = norm_launch(problem)
    if not problem.num_rows:
        return
    layer_norm_kernel[launch.grid](
        x,
        residual,
        weight,
        bias,
        out,
        eps,
        problem.width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        BLOCK=launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )


@triton.jit
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, eps, width,
    x_stride, residual_stride, out_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. The residual and the bias may be None."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = load_row(x_ptr, residual_ptr, row, columns, mask, x_stride, residual_stride)
    centred = tl.where(mask, x - tl.sum(x, 0) / width, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    y = centred * inverse * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=mask)
