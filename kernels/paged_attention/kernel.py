"""Paged attention in Triton, for NVIDIA and AMD: decode rows and prefill chunks of one batch.

A tile is the query heads that share a KV head, of one token (decode) or several (prefill), against
one cache block a trip. Softmax is in base 2. The cache is cut into segments at fixed positions;
each has a maximum and a sum of its own, and segments are merged in order, in registers or by a
second kernel: a row goes through the same arithmetic in every launch.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from qserve.kernels.gpu_target import gpu_target
from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.paged_attention.launch import (
    AttentionLaunch,
    AttentionProblem,
    attention_launch,
    padded_head_dim,
    tile_constants,
)

# Stands for minus infinity where the difference with itself must be zero.
_LOWEST = tl.constexpr(-1.0e30)


def paged_attention(
    q: torch.Tensor,
    kv: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Writes the attention output of every query row to ``out``; see the public op.

    Raises ``TypeError`` for a cache that is not 16 bits wide and ``ValueError`` for a block size
    that tensor cores cannot take or a scale that is not positive.
    """
    if kv.k.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"the cache is {kv.k.dtype}, expected float16 or bfloat16 on a GPU")
    if scale <= 0:
        raise ValueError(f"scale is {scale}, expected a positive number such as head_dim ** -0.5")
    problem = AttentionProblem(
        num_sequences=context_lens.size(0),
        num_rows=q.size(0),
        num_heads=q.size(1) // kv.head_dim,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        block_size=kv.block_size,
        max_context=block_tables.size(1) * kv.block_size,
    )
    if not problem.num_rows:
        return
    launch = attention_launch(problem, gpu_target(q.device))
    batch = (block_tables, context_lens, cu_seqlens_q)
    run(q, kv, batch, scale, out, launch)


def run(
    q: torch.Tensor,
    kv: LayerCache,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    out: torch.Tensor,
    launch: AttentionLaunch,
) -> None:
    """Runs one chosen launch: what ``paged_attention`` does once the rule has spoken.

    batch: block tables, context lengths and starts of the query rows.
    """
    problem = launch.problem
    sums = maxima = out
    if launch.parallel:
        shape = (problem.num_sequences, problem.num_heads, launch.num_segments)
        sums = torch.empty((*shape, problem.head_dim), dtype=torch.float32, device=q.device)
        maxima = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    arguments = (q, kv.k, kv.v, out, sums, maxima, *batch)
    strides = (q.stride(0), out.stride(0), batch[0].stride(0))
    for tile in (launch.decode, launch.prefill):
        if tile is None:
            continue
        attention_kernel[tile.grid](
            *arguments,
            scale * math.log2(math.e),
            *strides,
            problem.num_sequences,
            launch.num_segments,
            **tile_constants(launch, tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    if launch.parallel:
        merge_kernel[(problem.num_sequences, problem.num_heads)](
            sums,
            maxima,
            out,
            batch[1],
            batch[2],
            out.stride(0),
            launch.num_segments,
            SEGMENT_TOKENS=launch.blocks_per_segment * problem.block_size,
            HEAD_DIM=problem.head_dim,
            BLOCK_D=padded_head_dim(problem),
            num_warps=1,
        )


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sum_ptr, maximum_ptr, table_ptr, context_ptr, start_ptr,
    scale, q_stride, out_stride, table_stride, num_sequences, num_segments,
    HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SEGMENT_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, DECODE: tl.constexpr, PARALLEL: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one KV head, over its sequence or (PARALLEL) over a segment of it."""
    sequence, first_token, num_tokens, start = _find_tile(start_ptr, num_sequences, TOKENS, DECODE)
    if first_token >= num_tokens:
        return
    # Row r is token r // HEADS_PER_KV with head r % HEADS_PER_KV of those that share the KV head.
    rows = tl.arange(0, ROWS)
    tokens = first_token + rows // HEADS_PER_KV
    heads = tl.program_id(1) * HEADS_PER_KV + rows % HEADS_PER_KV
    dims = tl.arange(0, BLOCK_D)
    has_row = (rows < TOKENS * HEADS_PER_KV) & (tokens < num_tokens)
    mask = has_row[:, None] & (dims < HEAD_DIM)[None, :]
    at = (start + tokens).to(tl.int64)
    q_ptrs = q_ptr + (at * q_stride + heads * HEAD_DIM)[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0).to(k_ptr.dtype.element_ty)
    context = tl.load(context_ptr + sequence)
    before = context - num_tokens
    positions = before + tl.minimum(tokens, num_tokens - 1)
    first = tl.program_id(2) * SEGMENT_BLOCKS
    last = tl.cdiv(before + tl.minimum(first_token + TOKENS, num_tokens), BLOCK_SIZE)
    if PARALLEL:
        last = tl.minimum(last, first + SEGMENT_BLOCKS)
        if first >= last:
            return
    # Blocks before this one are seen whole by every row.
    whole = tl.maximum(first, tl.minimum(last, (before + first_token + 1) // BLOCK_SIZE))
    tables = table_ptr + sequence.to(tl.int64) * table_stride
    state, totals = _attend(
        q, k_ptr, v_ptr, tables, positions, context, scale, (first, whole, last),
        HEAD_DIM, BLOCK_D, BLOCK_SIZE, SEGMENT_BLOCKS, MERGE,
    )  # fmt: skip
    if PARALLEL:
        part = (sequence * tl.num_programs(1) * HEADS_PER_KV + heads) * num_segments
        part = part.to(tl.int64) + tl.program_id(2)
        sum_ptrs = sum_ptr + part[:, None] * HEAD_DIM + dims[None, :]
        _store_state(sum_ptrs, maximum_ptr + part * 2, state, mask, has_row)
    else:
        out_ptrs = out_ptr + (at * out_stride + heads * HEAD_DIM)[:, None] + dims[None, :]
        _store_mean(out_ptrs, _merge(totals, state), mask)


@triton.jit
def merge_kernel(
    sum_ptr, maximum_ptr, out_ptr, context_ptr, start_ptr, out_stride, num_segments,
    SEGMENT_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
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
    totals = _empty(1, BLOCK_D)
    for segment in tl.range(0, tl.cdiv(tl.load(context_ptr + sequence), SEGMENT_TOKENS)):
        at = part + segment
        sums = tl.load(sum_ptr + at * HEAD_DIM + dims, mask=mask, other=0.0)[None, :]
        maxima = tl.load(maximum_ptr + at * 2 + tl.arange(0, 1))
        weights = tl.load(maximum_ptr + at * 2 + 1 + tl.arange(0, 1))
        totals = _merge(totals, (sums, weights[:, None] + tl.zeros((1, 16), tl.float32), maxima))
    out_ptrs = out_ptr + start.to(tl.int64) * out_stride + head * HEAD_DIM + dims[None, :]
    _store_mean(out_ptrs, totals, mask[None, :])


@triton.jit
def _store_state(sum_ptrs, maximum_ptrs, state, mask, has_row):
    sums, weights, maxima = state
    tl.store(sum_ptrs, sums, mask=mask)
    tl.store(maximum_ptrs, maxima, mask=has_row)
    tl.store(maximum_ptrs + 1, tl.max(weights, 1), mask=has_row)


@triton.jit
def _store_mean(out_ptrs, state, mask):
    sums, weights, _ = state
    out = sums / tl.max(weights, 1)[:, None]
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _find_tile(start_ptr, num_sequences, TOKENS: tl.constexpr, DECODE: tl.constexpr):
    """The sequence of tile ``program_id(0)``, the tile's first token in it, its tokens, its start.

    A sequence of the other kind has no tokens. The tiles of sequence ``s`` begin at number
    ``start[s] // TOKENS + s``: that leaves room for all tiles of the sequences before.
    """
    tile = tl.program_id(0)
    sequence = tile
    if not DECODE:
        sequence = 0
        above = num_sequences
        while above - sequence > 1:
            middle = (sequence + above) // 2
            is_before = tl.load(start_ptr + middle) // TOKENS + middle <= tile
            sequence = tl.where(is_before, middle, sequence)
            above = tl.where(is_before, above, middle)
    start = tl.load(start_ptr + sequence)
    num_tokens = tl.load(start_ptr + sequence + 1) - start
    if DECODE:
        first_token = 0
        num_tokens = tl.where(num_tokens == 1, 1, 0)
    else:
        first_token = (tile - start // TOKENS - sequence) * TOKENS
        num_tokens = tl.where(num_tokens == 1, 0, num_tokens)
    return sequence, first_token, num_tokens, start


@triton.jit
def _empty(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A softmax over nothing: weighted sums of values, sums of weights, maxima of scores.

    Weights are summed by the tensor cores, 16 times alike, so that the order of the sum does not
    depend on how a tile spreads over threads.
    """
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    return sums, tl.zeros((ROWS, 16), tl.float32), tl.full((ROWS,), _LOWEST, tl.float32)


@triton.jit
def _merge(left, right):
    """The softmax over two disjoint sets of positions. Fused by hand: alike in every kernel."""
    left_sums, left_weights, left_maxima = left
    right_sums, right_weights, right_maxima = right
    maxima = tl.maximum(left_maxima, right_maxima)
    left_factors = tl.exp2(left_maxima - maxima)[:, None]
    right_factors = tl.exp2(right_maxima - maxima)[:, None]
    sums = tl.fma(right_sums, right_factors, left_sums * left_factors)
    weights = tl.fma(right_weights, right_factors, left_weights * left_factors)
    return sums, weights, maxima


@triton.jit
def _attend(
    q, k_ptr, v_ptr, table_ptr, positions, context, scale, span,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SEGMENT_BLOCKS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """The softmax of the segment at the end of ``span`` and, if MERGE, of the segments before it.

    span: the first block, the first that is not seen whole by all rows, and the end.
    """
    first, whole, last = span
    nothing = _empty(q.shape[0], BLOCK_D)
    state, totals = _attend_blocks(
        nothing, nothing, q, k_ptr, v_ptr, table_ptr, positions, context, scale, first, whole,
        HEAD_DIM, BLOCK_D, BLOCK_SIZE, SEGMENT_BLOCKS, False, MERGE,
    )  # fmt: skip
    return _attend_blocks(
        state, totals, q, k_ptr, v_ptr, table_ptr, positions, context, scale, whole, last,
        HEAD_DIM, BLOCK_D, BLOCK_SIZE, SEGMENT_BLOCKS, True, MERGE,
    )  # fmt: skip


@triton.jit
def _attend_blocks(
    state, totals, q, k_ptr, v_ptr, table_ptr, positions, context, scale, first, last,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SEGMENT_BLOCKS: tl.constexpr, MASKED: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """``state`` with blocks ``first`` to ``last - 1``, moved to ``totals`` at ends of segments."""
    sums, weights, maxima = state
    offsets = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, BLOCK_D)
    element_offsets = offsets[:, None] * HEAD_DIM + dims[None, :]
    has_dim = (dims < HEAD_DIM)[None, :]
    for block in range(first, last):
        page = tl.load(table_ptr + block).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        at = page * (BLOCK_SIZE * HEAD_DIM)
        keys = _load(k_ptr + at + element_offsets, has_dim, HEAD_DIM != BLOCK_D)
        scores = tl.dot(q, tl.trans(keys))
        if MASKED:
            is_seen = (block * BLOCK_SIZE + offsets)[None, :] <= positions[:, None]
            scores = tl.where(is_seen, scores, float("-inf"))
            # Slots past the end were never written, and zero times NaN would be NaN.
            is_written = (block * BLOCK_SIZE + offsets < context)[:, None]
            values = _load(v_ptr + at + element_offsets, has_dim & is_written, True)
        else:
            values = _load(v_ptr + at + element_offsets, has_dim, HEAD_DIM != BLOCK_D)
        highest = tl.maximum(maxima, tl.max(scores, 1) * scale)
        factors = tl.exp2(maxima - highest)[:, None]
        maxima = highest
        exponents = tl.fma(
            scores, tl.full(scores.shape, 0.0, tl.float32) + scale, -highest[:, None]
        )
        p = tl.exp2(exponents).to(values.dtype)
        weights = tl.dot(p, tl.full((BLOCK_SIZE, 16), 1.0, values.dtype), weights * factors)
        sums = tl.dot(p, values, sums * factors)
        if MERGE:  # noqa: SIM102 - the outer condition is decided at compile time
            if (block + 1) % SEGMENT_BLOCKS == 0:
                totals = _merge(totals, (sums, weights, maxima))
                sums, weights, maxima = _empty(sums.shape[0], BLOCK_D)
    return (sums, weights, maxima), totals


@triton.jit
def _load(ptrs, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptrs, mask=mask, other=0.0)
    return tl.load(ptrs)
