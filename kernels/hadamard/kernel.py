"""The Hadamard transform as a device function."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def log2(size: int) -> int:
    """The exponent of a power of two."""
    return size.bit_length() - 1


@triton.jit
def rotate_tile(x, RUN: tl.constexpr):
    """float32 ``x [rows, columns]``, a power of two of each, with every run of RUN columns rotated.

    Sums and differences are those of ``hadamard.rotate`` in its order: the result is the same to
    the bit, however a tile spreads over threads.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    for stage in tl.static_range(log2(RUN)):
        pairs = tl.reshape(x, (ROWS, COLUMNS // (2 << stage), 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        turned = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
        x = tl.reshape(turned, (ROWS, COLUMNS))
    return x * (RUN**-0.5)
