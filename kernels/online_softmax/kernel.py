"""The state of a softmax over some positions, from which the mean of their values follows.

Sums of values are one tensor ``[rows, columns]``, or two where a row of the cache holds two halves.
Weights ``[rows, 16]``, all columns alike, are summed by the tensor cores, so that the order of the
sum does not depend on how a tile spreads over threads. Offsets ``[rows, block]`` are sums of weight
times offset for each place in a block; ``close_state`` adds them up, in an order of its own, and
moves them into the sums of values. Maxima of the scores are ``[rows]``. Without halves the second
sums and the offsets are a single zero each.

Multiplications and additions are fused by hand: alike in every kernel.

``merge_kernel`` merges states that thread blocks have left in memory, in order.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from qserve.kernels.hadamard.kernel import log2, rotate_tile

# Stands for minus infinity where the difference with itself must be zero.
_LOWEST = tl.constexpr(-1.0e30)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def merge_kernel(
    sum_ptr, maximum_ptr, sink_ptr, out_ptr, context_ptr, start_ptr, window, out_stride,
    num_segments, SEGMENT_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """One head of one decoding sequence, from the parts that its segments left."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(start_ptr + sequence)
    if tl.load(start_ptr + sequence + 1) - start != 1:
        return
    dims = tl.arange(0, BLOCK_D)
    mask = dims < HEAD_DIM
    part = (sequence * tl.num_programs(1) + head).to(tl.int64) * num_segments
    context = tl.load(context_ptr + sequence)
    first = 0
    if window is not None:
        first = tl.maximum(context - window, 0) // SEGMENT_TOKENS
    state = empty_state(1, BLOCK_D, 1, False)
    one = tl.arange(0, 1)
    for segment in tl.range(first, tl.cdiv(context, SEGMENT_TOKENS)):
        at = part + segment
        sums = tl.load(sum_ptr + at * HEAD_DIM + dims, mask=mask, other=0.0)[None, :]
        maxima = tl.load(maximum_ptr + at * 2 + one)
        weights = tl.load(maximum_ptr + at * 2 + 1 + one)[:, None] + tl.zeros((1, 16), tl.float32)
        state = merge_states(state, (sums, state[1], state[2], weights, maxima), False)
    sinks = None if sink_ptr is None else tl.load(sink_ptr + head + one)
    factors, weights = mean_factors(state, sinks)
    sums = state[0] * factors / weights
    if ROTATE:
        sums = rotate_tile(sums, HEAD_DIM & -HEAD_DIM)
    out_ptrs = out_ptr + start.to(tl.int64) * out_stride + head * HEAD_DIM + dims[None, :]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=mask[None, :])


@triton.jit
def empty_state(
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """The softmax over nothing."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    high_sums = tl.zeros((ROWS if HALVES else 1, COLUMNS if HALVES else 1), tl.float32)
    offsets = tl.zeros((ROWS if HALVES else 1, BLOCK if HALVES else 1), tl.float32)
    weights = tl.zeros((ROWS, 16), tl.float32)
    return sums, high_sums, offsets, weights, tl.full((ROWS,), _LOWEST, tl.float32)


@triton.jit
def close_state(state, HALVES: tl.constexpr):
    """``state`` with the offsets moved into the sums of values, ready to be merged."""
    sums, high_sums, offsets, weights, maxima = state
    if HALVES:
        total = _add_columns(offsets)
        sums += total
        high_sums += total
        offsets = tl.zeros_like(offsets)
    return sums, high_sums, offsets, weights, maxima


@triton.jit
def merge_states(left, right, HALVES: tl.constexpr):
    """The softmax over two disjoint sets of positions, from closed states."""
    left_sums, left_high, offsets, left_weights, left_maxima = left
    right_sums, right_high, _, right_weights, right_maxima = right
    maxima = tl.maximum(left_maxima, right_maxima)
    left_factors = tl.exp2(left_maxima - maxima)[:, None]
    right_factors = tl.exp2(right_maxima - maxima)[:, None]
    sums = tl.fma(right_sums, right_factors, left_sums * left_factors)
    high_sums = left_high
    if HALVES:
        high_sums = tl.fma(right_high, right_factors, left_high * left_factors)
    weights = tl.fma(right_weights, right_factors, left_weights * left_factors)
    return sums, high_sums, offsets, weights, maxima


@triton.jit
def mean_factors(state, sinks):
    """What sums of values are multiplied with, and then divided by, to be means: two ``[rows, 1]``.

    sinks: a logit for each row that joins the weights with no value; None for no sinks.
    """
    _, _, _, weights, maxima = state
    weight = tl.max(weights, 1)
    factor = tl.full(weight.shape, 1.0, tl.float32)
    if sinks is not None:
        logits = sinks * _LOG2_E
        highest = tl.maximum(maxima, logits)
        factor = tl.exp2(maxima - highest)
        weight = tl.fma(weight, factor, tl.exp2(logits - highest))
    return factor[:, None], weight[:, None]


@triton.jit
def _add_columns(x):
    """The sums of the rows of ``x``, the two halves of its columns added until one is left."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    for stage in tl.static_range(log2(COLUMNS)):
        halves = tl.reshape(x, (ROWS, 2, COLUMNS >> (stage + 1)))
        first, second = tl.split(tl.permute(halves, (0, 2, 1)))
        x = first + second
    return x
