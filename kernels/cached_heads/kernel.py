"""Device functions on the heads of a paged cache: keys as scores, sums of values, and the halves of
4-bit heads.

A row of a 4-bit cache holds a head as two halves, in the low and the high nibbles of its bytes, and
is rotated. Queries are rotated and cut alike; results are put together again.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from qserve.kernels.code_conversion.kernel import convert_codes, convert_int4
from qserve.kernels.hadamard.kernel import rotate_tile


@triton.jit
def halve_queries(
    q, k_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """Queries as keys meet them, in two halves, and their sums ``[rows, 1]`` for offsets of keys.

    Keys of float16 and bfloat16 fix the dtype. Those of four bits are rotated, and so are queries;
    other queries are given twice, with sums of zero that nothing reads.
    """
    if HALVES:
        columns = tl.arange(0, BLOCK_D)
        rotated = rotate_tile(q.to(tl.float32), HEAD_DIM & -HEAD_DIM)
        is_in = (columns < HEAD_DIM // 2)[None, :]
        low_columns = tl.broadcast_to(columns[None, :], (q.shape[0], BLOCK_D))
        high_columns = tl.minimum(low_columns + HEAD_DIM // 2, 2 * BLOCK_D - 1)
        low = tl.where(is_in, tl.gather(rotated, low_columns, 1), 0.0).to(q.dtype)
        high = tl.where(is_in, tl.gather(rotated, high_columns, 1), 0.0).to(q.dtype)
        ones = tl.full((BLOCK_D, 16), 1.0, q.dtype)
        sums = tl.max(tl.dot(high, ones, tl.dot(low, ones)), 1)[:, None]
        return low, high, sums
    else:
        if k_ptr.dtype.element_ty.is_floating():
            q = q.to(k_ptr.dtype.element_ty)
        return q, q, tl.zeros((1, 1), tl.float32)


@triton.jit
def score_keys(
    queries, key_ptrs, scale_ptr, offset_ptr, slots, has_dim, PADDED: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The products of ``halve_queries``' queries with the keys of a block: ``[rows, block]``.

    slots: where the scales and offsets of the block are, if there are any. has_dim: which columns a
    row of the cache has, asked for if PADDED.
    """
    low_queries, high_queries, query_sums = queries
    dtype: tl.constexpr = low_queries.dtype
    keys = load_rows(key_ptrs, has_dim, PADDED)
    if offset_ptr is not None:
        low, high = convert_int4(keys, dtype, PTX)
        scores = tl.dot(high_queries, tl.trans(high), tl.dot(low_queries, tl.trans(low)))
    else:
        scores = tl.dot(low_queries, tl.trans(convert_codes(keys, dtype, PTX)))
    if scale_ptr is not None:
        scores *= tl.load(scale_ptr + slots).to(tl.float32)[None, :]
    if offset_ptr is not None:
        key_offsets = tl.load(offset_ptr + slots).to(tl.float32)[None, :]
        scores = tl.fma(query_sums, key_offsets, scores)
    return scores


@triton.jit
def weigh_values(
    state, p, decay, values, scale_ptr, offset_ptr, slots, is_written, DTYPE: tl.constexpr,
    MASKED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``state`` times ``decay``, with the ``values`` of a block weighted by ``p [rows, block]``.

    state: the sums of values, of their upper halves and of their offsets. slots: where the scales
    and offsets of the block are, if there are any; if MASKED, read only where ``is_written``.
    """
    sums, high_sums, offset_sums = state
    if scale_ptr is not None:
        scales = load_rows(scale_ptr + slots, is_written, MASKED).to(tl.float32)
        p *= scales[None, :]
    weights = p.to(DTYPE)
    if offset_ptr is not None:
        # In units of codes an offset meets the rounded weight that the codes meet. With the exact
        # one, a part that most codes have and the offset takes away again would not go away:
        # rotated back, that is an error in one element, sqrt(head_dim) times as large.
        offsets = load_rows(offset_ptr + slots, is_written, MASKED).to(tl.float32)
        zero_codes = offsets / tl.where(is_written, scales, 1.0)
        offset_sums = tl.fma(weights.to(tl.float32), zero_codes[None, :], offset_sums * decay)
        low, high = convert_int4(values, DTYPE, PTX)
        sums = tl.dot(weights, low, sums * decay)
        high_sums = tl.dot(weights, high, high_sums * decay)
    else:
        sums = tl.dot(weights, convert_codes(values, DTYPE, PTX), sums * decay)
    return sums, high_sums, offset_sums


@triton.jit
def join_halves(state, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """The sums of values of a state with both halves of a head side by side."""
    low, high, _, _, _ = state
    joined = low
    if HALVES:
        ROWS: tl.constexpr = low.shape[0]
        joined = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (ROWS, 2 * BLOCK_D))
        if HEAD_DIM != 2 * BLOCK_D:
            dims = tl.arange(0, 2 * BLOCK_D)
            columns = tl.where(dims < HEAD_DIM // 2, dims, dims + BLOCK_D - HEAD_DIM // 2)
            columns = tl.minimum(columns, 2 * BLOCK_D - 1)
            joined = tl.gather(joined, tl.broadcast_to(columns[None, :], joined.shape), 1)
            joined = tl.where((dims < HEAD_DIM)[None, :], joined, 0.0)
    return joined


@triton.jit
def load_rows(ptrs, mask, MASKED: tl.constexpr):
    """What lies at ``ptrs``; zeros where ``mask`` is not set, which is asked for if MASKED."""
    if MASKED:
        return tl.load(ptrs, mask=mask, other=0)
    return tl.load(ptrs)
