"""Rows rounded to int8 or float8 with one scale each, in Triton: one thread block a row.

The values are those of ``activations.quantize_tokens`` and ``quantize_tokens_float8``, to the bit.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.activations import MAX_CODE, MAX_FLOAT8, Activations
from qserve.kernels.tiled_matmul.launch import BLOCK

ROW_BLOCK = 1024
"""Inputs that a thread block holds at a time."""

_LARGEST = {Activations.INT8_TOKEN: float(MAX_CODE), Activations.FLOAT8_TOKEN: MAX_FLOAT8}


def quantize_tokens(
    x: torch.Tensor, activations: Activations, dtype: torch.dtype, *, planar: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of rows ``x [M, K]`` and their float32 scales ``[M]``.

    activations: INT8_TOKEN or FLOAT8_TOKEN. dtype: of the values, int8, a float8 or float16 or
    bfloat16, which hold those of both exactly; FNUZ float8 holds half the value and twice the
    scale. Returns ``[M, ceil(K / 128) * 128]``, zeros past the end. planar: inputs in the order in
    which bytes of planar4 hold them, those of lower nibbles first: see ``planar_order``.
    """
    num_rows, num_inputs = x.shape
    width = num_inputs + -num_inputs % BLOCK
    codes = torch.empty(num_rows, width, dtype=dtype, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        quantize_kernel[(num_rows,)](
            x,
            codes,
            scales,
            num_inputs,
            width,
            x.stride(0),
            **row_constants(activations, dtype, planar),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return codes, scales


def round_tokens(
    x: torch.Tensor, activations: Activations
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows that are ``x`` as ``activations`` rounds it, in its dtype, and their scales if any.

    Only rounding with one scale a row is done; other rows are ``x`` itself.
    """
    if activations not in _LARGEST:
        return x, None
    return quantize_tokens(x, activations, x.dtype)


def row_constants(
    activations: Activations, dtype: torch.dtype, planar: bool
) -> dict[str, float | bool | int]:
    """The compile-time arguments of the kernel."""
    return {
        "LARGEST": _LARGEST[activations],
        "FLOAT8": activations is Activations.FLOAT8_TOKEN,
        "HALVED": dtype is torch.float8_e4m3fnuz,
        "PLANAR": planar,
        "BLOCK": ROW_BLOCK,
    }


@triton.jit
def quantize_kernel(
    x_ptr, code_ptr, scale_ptr, num_inputs, width, x_stride,
    LARGEST: tl.constexpr, FLOAT8: tl.constexpr, HALVED: tl.constexpr, PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the largest magnitude, then every value over it."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    code_ptr += row * width
    at = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_inputs, BLOCK):
        x = tl.load(x_ptr + start + at, mask=start + at < num_inputs, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    magnitude = tl.max(largest, 0)
    # As PyTorch divides a number by a tensor: two roundings.
    inverse = tl.div_rn(1.0, tl.where(magnitude > 0, magnitude, LARGEST)) * LARGEST
    scale = tl.div_rn(magnitude, LARGEST)
    tl.store(scale_ptr + row, scale * 2 if HALVED else scale)
    # Place s of a block of 128 holds an input of the lower (s < 64) or upper nibbles.
    source = at
    if PLANAR:
        source = at // 128 * 128 + at % 64 // 2 + at % 2 * 64 + at % 128 // 64 * 32
    for start in range(0, width, BLOCK):
        x = tl.load(x_ptr + start + source, mask=start + source < num_inputs, other=0.0)
        values = tl.clamp(x.to(tl.float32) * inverse, -LARGEST, LARGEST)
        values = _round_to_float8(values) if FLOAT8 else _round_to_integer(values)
        if HALVED:
            values = values * 0.5 + 0.0  # the same bits, and no negative zero, which means NaN
        codes = values.to(code_ptr.dtype.element_ty)
        tl.store(code_ptr + start + at, codes, mask=start + at < width)


@triton.jit
def _round_to_integer(values):
    """To nearest even, below 2^22: the sum has no bits for a fraction."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def _round_to_float8(values):
    """To the nearest float8 e4m3, ties to even: 3 bits below the leading one, from 2^-6 up."""
    power = (values.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 * 2^20: as 1.5 * 2^23 for integers
    return (values + shift) - shift
