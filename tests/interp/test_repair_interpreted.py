"""The repaired interpreter computes as hardware does where Triton's own does not."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from qserve.kernels.int4_matmul.unpack_ptx import (
    BF16_BIAS,
    FP16_HIGH_BIAS,
    FP16_LOW_BIAS,
    unpack_ptx,
)

Evaluate = Callable[[str, int, Sequence[np.ndarray]], list[np.ndarray]]

SIZE = 64


@triton.jit
def multiply_add_kernel(a_ptr, b_ptr, out_ptr, larger_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    tl.store(out_ptr + at, a * b + a)
    tl.store(larger_ptr + at, tl.where(a > b, a, b))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def cast_kernel(in_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(in_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def scalar_mask_kernel(in_ptr, out_ptr, limit, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(in_ptr + at, mask=limit > 3, other=-1.0))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def test_bfloat16_is_multiplied_added_and_compared() -> None:
    a, b = random(SIZE).bfloat16(), random(SIZE, 1)[:, 0].bfloat16()
    out, larger = torch.empty_like(a), torch.empty_like(a)
    multiply_add_kernel[(1,)](a, b, out, larger, N=SIZE)
    assert torch.equal(out, a * b + a)
    assert torch.equal(larger, torch.maximum(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dot_is_exact_up_to_one_rounding(dtype: torch.dtype) -> None:
    a, b = random(16, 16).to(dtype), random(16, 16).T.contiguous().to(dtype)
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out)
    assert torch.equal(out, (a.double() @ b.double()).float())


def test_casts_to_bfloat16_round_to_nearest_even() -> None:
    wide = torch.cat([random(SIZE - 2), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])])
    narrow = torch.empty(SIZE, dtype=torch.bfloat16)
    cast_kernel[(1,)](wide, narrow, N=SIZE)
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_to_float8_saturate(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    wide = torch.cat([100 * random(SIZE - 2), torch.tensor([1e9, -1e9])])
    narrow = torch.empty(SIZE, dtype=dtype)
    cast_kernel[(1,)](wide, narrow, N=SIZE)
    assert torch.equal(narrow.float(), wide.clamp(-largest, largest).to(dtype).float())


@pytest.mark.parametrize(("limit", "expected"), [(5, 2.0), (2, -1.0)])
def test_a_comparison_of_scalars_is_a_mask(limit: int, expected: float) -> None:
    out = torch.zeros(SIZE)
    scalar_mask_kernel[(1,)](torch.full((SIZE,), 2.0), out, limit, N=SIZE)
    assert torch.equal(out, torch.full((SIZE,), expected))


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("first_plane", [0, 2])
def test_the_assembly_unpacks_every_code_and_zero_point(
    evaluate_ptx: Evaluate, first_plane: int, bfloat16: bool
) -> None:
    codes, zeros = (grid.flatten() for grid in np.meshgrid(np.arange(16), np.arange(16)))
    low, high = codes << (4 * first_plane), (15 - codes) << (4 * first_plane + 4)
    noise = 0xFFFF & ~(0xFF << (4 * first_plane))  # of the other planes
    words = (low | high | noise) * 0x10001
    low_bias, high_bias = (BF16_BIAS | zeros,) * 2
    if not bfloat16:
        low_bias, high_bias = FP16_LOW_BIAS | zeros, FP16_HIGH_BIAS | zeros << 4
    inputs = [
        (x & 0xFFFFFFFF).astype(np.uint32) for x in (words, low_bias * 65537, high_bias * 65537)
    ]
    results = evaluate_ptx(unpack_ptx(first_plane, bfloat16, False), 2, inputs)
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    for result, expected in zip(results, (codes - zeros, 15 - codes - zeros), strict=True):
        halves = torch.from_numpy(result.view(np.int16)).view(dtype).float()
        assert np.array_equal(halves.numpy(), np.repeat(expected, 2).astype(np.float32))


def test_an_unknown_instruction_is_refused(evaluate_ptx: Evaluate) -> None:
    with pytest.raises(ValueError, match="ex2"):
        evaluate_ptx("{ ex2.approx.f32 $0, $1; }", 1, [np.zeros(1, np.uint32)])
