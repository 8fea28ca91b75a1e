"""Codes become the numbers that they stand for, in assembly and without it."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from qserve.kernels.code_conversion.kernel import convert_float8, convert_int4, convert_int8

ALL_BYTES = torch.arange(256).to(torch.uint8)

every_variant = pytest.mark.parametrize(
    ("dtype", "ptx"),
    [(dtype, ptx) for dtype in (torch.float16, torch.bfloat16) for ptx in (True, False)],
)


@triton.jit
def int8_kernel(in_ptr, out_ptr, PTX: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out_ptr + at, convert_int8(tl.load(in_ptr + at), out_ptr.dtype.element_ty, PTX))


@triton.jit
def float8_kernel(in_ptr, out_ptr, PTX: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out_ptr + at, convert_float8(tl.load(in_ptr + at), out_ptr.dtype.element_ty, PTX))


@triton.jit
def int4_kernel(in_ptr, low_ptr, high_ptr, PTX: tl.constexpr):
    at = tl.arange(0, 256)
    low, high = convert_int4(tl.load(in_ptr + at), low_ptr.dtype.element_ty, PTX)
    tl.store(low_ptr + at, low)
    tl.store(high_ptr + at, high)


@every_variant
def test_every_int8_code_is_its_number(dtype: torch.dtype, ptx: bool) -> None:
    out = torch.empty(256, dtype=dtype)
    int8_kernel[(1,)](ALL_BYTES.view(torch.int8), out, PTX=ptx)
    assert torch.equal(out, ALL_BYTES.view(torch.int8).to(dtype))


@every_variant
def test_every_float8_code_but_nan_is_its_number(dtype: torch.dtype, ptx: bool) -> None:
    out = torch.empty(256, dtype=dtype)
    float8_kernel[(1,)](ALL_BYTES, out, PTX=ptx)
    expected = ALL_BYTES.view(torch.float8_e4m3fn).to(dtype)
    is_number = ~expected.isnan()
    assert int(is_number.sum()) == 254
    assert torch.equal(out[is_number], expected[is_number])


@every_variant
def test_both_nibbles_of_every_byte_are_their_numbers(dtype: torch.dtype, ptx: bool) -> None:
    low, high = torch.empty(256, dtype=dtype), torch.empty(256, dtype=dtype)
    int4_kernel[(1,)](ALL_BYTES, low, high, PTX=ptx)
    assert torch.equal(low, (ALL_BYTES & 15).to(dtype))
    assert torch.equal(high, (ALL_BYTES >> 4).to(dtype))
