"""The norm of heads in Triton."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.head_norm.launch import HeadNormProblem, head_norm_launch


def head_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float, out: torch.Tensor
) -> None:
    """Writes ``x`` with each of its heads normed to ``out``."""
    head_dim = weight.shape[0]
    problem = HeadNormProblem(x.shape[0], x.shape[1] // head_dim, head_dim)
    if not problem.num_rows:
        return
    launch = head_norm_launch(problem)
    head_norm_kernel[launch.grid](
        x,
        weight,
        out,
        eps,
        weight_offset,
        problem.num_heads,
        x.stride(0),
        out.stride(0),
        HEADS=launch.heads,
        HEAD_DIM=head_dim,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )


@triton.jit
def head_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps, weight_offset, num_heads, x_stride, out_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, BLOCK)
    at = heads[:, None] * HEAD_DIM + columns[None, :]
    mask = (heads < num_heads)[:, None] & (columns < HEAD_DIM)[None, :]
    x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)
    y = x * inverse[:, None] * (weight + weight_offset)[None, :]
    tl.store(out_ptr + row * out_stride + at, y.to(out_ptr.dtype.element_ty), mask=mask)
