"""Codes of 4 and 8 bits as 16-bit floats, exactly: in inline assembly or, for AMD, without it.

The assembly is not declared pure, and so stays where it is: a lane converts the 16 neighbouring
bytes that it has loaded, and tensor cores fetch floats. Otherwise the compiler moves it behind the
change of layout, and single bytes are gathered: a third more instructions for values of a cache.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from qserve.kernels.code_conversion.ptx import float8_ptx, int4_ptx, int8_ptx

_int8_ptx = triton.constexpr_function(int8_ptx)
_float8_ptx = triton.constexpr_function(float8_ptx)
_int4_ptx = triton.constexpr_function(int4_ptx)


@triton.jit
def convert_codes(codes, dtype: tl.constexpr, PTX: tl.constexpr):
    """Codes of a byte in ``dtype``: int8, e4m3 as uint8, or what is a float already, as it is."""
    if codes.dtype == tl.int8:
        floats = convert_int8(codes, dtype, PTX)
    elif codes.dtype == tl.uint8:
        floats = convert_float8(codes, dtype, PTX)
    else:
        floats = codes
    return floats


@triton.jit
def convert_int8(codes, dtype: tl.constexpr, PTX: tl.constexpr):
    """int8 ``codes`` in ``dtype``, float16 or bfloat16."""
    if PTX:
        floats = tl.inline_asm_elementwise(
            _int8_ptx(dtype == tl.bfloat16), "=&r,=&r,r", [codes],
            dtype=tl.int16, is_pure=False, pack=4,
        ).to(dtype, bitcast=True)  # fmt: skip
    else:
        floats = _narrow(codes.to(tl.float32), dtype)
    return floats


@triton.jit
def convert_float8(bits, dtype: tl.constexpr, PTX: tl.constexpr):
    """The numbers in ``dtype`` whose e4m3 bits are the uint8 ``bits``."""
    if PTX:
        floats = tl.inline_asm_elementwise(
            _float8_ptx(dtype == tl.bfloat16), "=&r,=&r,r", [bits],
            dtype=tl.int16, is_pure=False, pack=4,
        ).to(dtype, bitcast=True)  # fmt: skip
    elif dtype == tl.float16:
        wide = bits.to(tl.int32)
        moved = (wide & 0x80) << 8 | (wide & 0x7F) << 7
        floats = moved.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    else:
        wide = bits.to(tl.int32)
        moved = (wide & 0x80) << 24 | (wide & 0x7F) << 20
        floats = _narrow(moved.to(tl.float32, bitcast=True) * 1.329227995784916e36, dtype)  # 2**120
    return floats


@triton.jit
def convert_int4(codes, dtype: tl.constexpr, PTX: tl.constexpr):
    """The low and the high nibbles of uint8 ``codes`` in ``dtype``: two tensors of its shape."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            _int4_ptx(dtype == tl.bfloat16), "=&r,=&r,=&r,=&r,r", [codes],
            dtype=(tl.int16, tl.int16), is_pure=False, pack=4,
        )  # fmt: skip
        low = low.to(dtype, bitcast=True)
        high = high.to(dtype, bitcast=True)
    else:
        low = _narrow((codes & 15).to(tl.float32), dtype)
        high = _narrow((codes >> 4).to(tl.float32), dtype)
    return low, high


@triton.jit
def _narrow(values, dtype: tl.constexpr):
    """Small float32 ``values`` in ``dtype``. bfloat16 is their upper half: hardware without
    bfloat16 arithmetic would round every one in five instructions."""
    if dtype == tl.bfloat16:
        return (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(dtype, bitcast=True)
    return values.to(dtype)
