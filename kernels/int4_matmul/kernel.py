"""The int4 matmul in Triton, for NVIDIA and AMD: ``out = x @ dequantize(weight).T``.

The tile is computed transposed, ``weight @ x.T``: warps then share the outputs among them, and each
weight is unpacked once instead of once a warp.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.gpu_target import gpu_target
from qserve.kernels.int4_matmul.launch import (
    REDUCE_BLOCK,
    Int4Launch,
    Int4Problem,
    int4_launch,
    matmul_constants,
)
from qserve.kernels.int4_matmul.planar4 import Planar4Weight
from qserve.kernels.int4_matmul.unpack_ptx import (
    BF16_BIAS,
    FP16_HIGH_BIAS,
    FP16_LOW_BIAS,
    unpack_constraints,
    unpack_ptx,
)

_ptx = triton.constexpr_function(unpack_ptx)
_constraints = triton.constexpr_function(unpack_constraints)
_FP16_LOW_BIAS = tl.constexpr(FP16_LOW_BIAS)
_FP16_HIGH_BIAS = tl.constexpr(FP16_HIGH_BIAS)
_BF16_BIAS = tl.constexpr(BF16_BIAS)


def int4_matmul(x: torch.Tensor, weight: Planar4Weight, out: torch.Tensor) -> None:
    """Writes ``x @ dequantize(weight).T`` to ``out``, with float32 sums.

    x: float16 or bfloat16 ``[num_rows, in_features]``, rows contiguous, 16-byte aligned.
    out: ``[num_rows, out_features]``, contiguous rows, of the same dtype. Raises ``TypeError`` for
    another dtype.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}, expected float16 or bfloat16 on a GPU: cast it before")
    problem = Int4Problem(
        x.shape[0], weight.out_features, weight.in_features, weight.group_size, x.dtype
    )
    if problem.num_rows:
        run(x, weight, out, int4_launch(problem, gpu_target(x.device)))


def run(x: torch.Tensor, weight: Planar4Weight, out: torch.Tensor, launch: Int4Launch) -> None:
    """Runs one chosen launch: what ``int4_matmul`` does once the rule has spoken."""
    num_rows, num_outputs = out.shape
    target, row_stride = out, out.stride(0)
    if launch.parallel:
        target = torch.empty(
            (launch.num_segments, num_rows, num_outputs), dtype=torch.float32, device=x.device
        )
        row_stride = num_outputs
    matmul_kernel[launch.grid](
        x,
        weight.words,
        weight.parameters,
        target,
        num_rows,
        num_outputs,
        weight.in_features,
        weight.words.shape[1],
        x.stride(0),
        row_stride,
        launch.blocks_per_segment,
        **matmul_constants(launch, weight.scale_dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )
    if launch.parallel:
        reduce_kernel[(triton.cdiv(num_outputs, REDUCE_BLOCK), num_rows)](
            target,
            out,
            num_outputs,
            num_rows * num_outputs,
            out.stride(0),
            NUM_SEGMENTS=launch.num_segments,
            BLOCK=REDUCE_BLOCK,
            num_warps=4,
        )


@triton.jit
def matmul_kernel(
    x_ptr, word_ptr, parameter_ptr, out_ptr,
    num_rows, num_outputs, num_inputs, word_stride, x_stride, out_stride, blocks_per_segment,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr,
    EVEN: tl.constexpr, HOIST: tl.constexpr, LOP3: tl.constexpr, BFLOAT16_SCALES: tl.constexpr,
):  # fmt: skip
    """A tile of ``x @ weight.T``, summed over SEGMENTS segments from number ``program_id(2)`` on.

    out_ptr: ``[num_rows, num_outputs]``, one after the other for each value of ``program_id(2)``.
    EVEN: the inputs are a multiple of 128. Other names are those of ``Int4Launch``.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    segment = tl.program_id(2)
    # Past the edge the last row and output are read again: cheaper than masks in the loop.
    near_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    near_outputs = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    x_ptrs = x_ptr + near_rows[:, None] * x_stride + tl.arange(0, 32)[None, :]
    word_ptrs = word_ptr + near_outputs[:, None] * word_stride + tl.arange(0, 32)[None, :]
    num_blocks = tl.cdiv(num_inputs, 128)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(SEGMENTS):
        first = (segment + step) * blocks_per_segment
        last = tl.minimum(first + blocks_per_segment, num_blocks)
        total += _sum_blocks(
            x_ptrs, word_ptrs, parameter_ptr + near_outputs, num_inputs, num_outputs, first, last,
            GROUP, BLOCK_M, BLOCK_N, EVEN, HOIST, LOP3, BFLOAT16_SCALES,
        )  # fmt: skip

    out_ptr += segment.to(tl.int64) * num_rows * num_outputs
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * out_stride + outputs[:, None]
    mask = (rows < num_rows)[None, :] & (outputs < num_outputs)[:, None]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduce_kernel(
    partial_ptr, out_ptr, num_outputs, segment_stride, out_stride,
    NUM_SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[row, :]`` as the partial sums of the segments, added from the first to the last."""
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = outputs < num_outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for segment in tl.static_range(NUM_SEGMENTS):
        offset = tl.cast(segment, tl.int64) * segment_stride + row * num_outputs
        total += tl.load(partial_ptr + offset + outputs, mask=mask, other=0.0)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + outputs, out, mask=mask)


@triton.jit
def _sum_blocks(
    x_ptrs, word_ptrs, parameter_ptrs, num_inputs, num_outputs, first, last,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, HOIST: tl.constexpr, LOP3: tl.constexpr, BFLOAT16_SCALES: tl.constexpr,
):  # fmt: skip
    """The tile summed over blocks ``first`` to ``last - 1``: float32 ``[BLOCK_N, BLOCK_M]``."""
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        words = tl.load(word_ptrs + block * 32)
        for half in tl.static_range(2):
            k = block * 128 + half * 64
            if half == 0 or GROUP < 128:
                low_ptrs = parameter_ptrs + k // GROUP * num_outputs
                low_parameters = tl.load(low_ptrs)
                high_parameters = low_parameters
            if GROUP == 32:
                high_parameters = tl.load(low_ptrs + num_outputs)
            low, high = _unpack(
                words, low_parameters, high_parameters,
                2 * half, dtype, HOIST, LOP3, BFLOAT16_SCALES,
            )  # fmt: skip
            low_x = _load_plane(x_ptrs, k, num_inputs, EVEN)
            high_x = _load_plane(x_ptrs, k + 32, num_inputs, EVEN)
            if HOIST:
                if half == 0 or GROUP < 128:
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                part = tl.dot(low, tl.trans(low_x), part)
                if GROUP == 32:
                    total += part * _scales(low_parameters, BFLOAT16_SCALES)
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                part = tl.dot(high, tl.trans(high_x), part)
                if half == 1 or GROUP < 128:
                    total += part * _scales(high_parameters, BFLOAT16_SCALES)
            else:
                total = tl.dot(low, tl.trans(low_x), total)
                total = tl.dot(high, tl.trans(high_x), total)
    return total


@triton.jit
def _load_plane(x_ptrs, k, num_inputs, EVEN: tl.constexpr):
    """Inputs ``k`` to ``k + 31`` of the rows. No group is smaller: all of them exist, or none."""
    if EVEN:
        return tl.load(x_ptrs + k)
    return tl.load(x_ptrs + k, mask=k < num_inputs, other=0.0)


@triton.jit
def _scales(parameters, BFLOAT16_SCALES: tl.constexpr):
    """The float32 scales ``[BLOCK_N, 1]`` of packed parameters."""
    if BFLOAT16_SCALES:
        scales = (parameters << 16).to(tl.float32, bitcast=True)
    else:
        scales = parameters.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scales[:, None]


@triton.jit
def _biases(zero_points, BITS: tl.constexpr, dtype: tl.constexpr):
    """Floats whose bits are ``BITS | zero_points``: ``[BLOCK_N, 1]``."""
    return (zero_points | BITS).to(tl.int16).to(dtype, bitcast=True)[:, None]


@triton.jit
def _less_zero(containers, zero_points, dtype: tl.constexpr):
    """The lowest code of ``containers`` less its zero point, exact in ``dtype``."""
    codes = containers & 15
    if dtype == tl.bfloat16:
        # Hardware without bfloat16 arithmetic would round every result in five instructions; small
        # integers need no rounding, the upper half of the float32 is the number.
        values = codes.to(tl.float32) - zero_points.to(tl.float32)[:, None]
        return (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(dtype, bitcast=True)
    return codes.to(dtype) - zero_points.to(dtype)[:, None]


@triton.jit
def _unpack(
    words, low_parameters, high_parameters, FIRST_PLANE: tl.constexpr, dtype: tl.constexpr,
    HOIST: tl.constexpr, LOP3: tl.constexpr, BFLOAT16_SCALES: tl.constexpr,
):  # fmt: skip
    """Planes FIRST_PLANE and the next of ``words``, less their zero points: ``[BLOCK_N, 32]`` each.

    They are scaled too unless HOIST. Arithmetic is in ``dtype``; without the scale it is exact.
    """
    low_zeros = low_parameters >> 16
    high_zeros = high_parameters >> 16
    low_scales = _scales(low_parameters, BFLOAT16_SCALES).to(dtype)
    high_scales = _scales(high_parameters, BFLOAT16_SCALES).to(dtype)
    if LOP3 and dtype == tl.bfloat16:
        low_biases = _biases(low_zeros, _BF16_BIAS, dtype)
        high_biases = _biases(high_zeros, _BF16_BIAS, dtype)
        low, high = tl.inline_asm_elementwise(
            _ptx(FIRST_PLANE, True, False), _constraints(False),
            [words, low_biases, high_biases],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif LOP3:
        low_biases = _biases(low_zeros, _FP16_LOW_BIAS, dtype)
        high_biases = _biases(high_zeros << 4, _FP16_HIGH_BIAS, dtype)
        if HOIST:
            low, high = tl.inline_asm_elementwise(
                _ptx(FIRST_PLANE, False, False), _constraints(False),
                [words, low_biases, high_biases],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                _ptx(FIRST_PLANE, False, True), _constraints(True),
                [words, low_biases, high_biases, low_scales, high_scales],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
    else:
        low = _less_zero(words >> (4 * FIRST_PLANE), low_zeros, dtype)
        high = _less_zero(words >> (4 * FIRST_PLANE + 4), high_zeros, dtype)
    if not HOIST and not (LOP3 and dtype == tl.float16):
        low *= low_scales
        high *= high_scales
    return low, high
