"""Paged attention in Triton, for NVIDIA and AMD: decode rows and prefill chunks of one batch.

A tile is the query heads that share a KV head, of one token (decode) or several (prefill), against
one cache block a trip. Softmax is in base 2. The cache is cut into segments at fixed positions;
each has a maximum and a sum of its own, and segments are merged in order, in registers or by a
second kernel: a row goes through the same arithmetic in every launch.

Codes of a quantized cache become 16-bit floats as they are. The scale of a key multiplies its
column of scores, that of a value its column of weights; a 4-bit offset joins as a term of its own.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from qserve.kernels.cached_heads.kernel import (
    halve_queries,
    join_halves,
    load_rows,
    score_keys,
    weigh_values,
)
from qserve.kernels.gpu_target import gpu_target
from qserve.kernels.hadamard.kernel import rotate_tile
from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.online_softmax.kernel import (
    close_state,
    empty_state,
    mean_factors,
    merge_kernel,
    merge_states,
)
from qserve.kernels.paged_attention.launch import (
    AttentionLaunch,
    AttentionProblem,
    attention_launch,
    merge_constants,
    tile_constants,
)
from qserve.kernels.paged_attention.scoring import Scoring


def paged_attention(
    q: torch.Tensor,
    kv: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scoring: Scoring,
    out: torch.Tensor,
) -> None:
    """Writes the attention output of every query row to ``out``; see the public op.

    Raises ``TypeError`` for a cache of float32 and ``ValueError`` for a block size that tensor
    cores cannot take or a scale that is not positive.
    """
    if kv.format is KvFormat.FLOAT32 or q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"q is {q.dtype} and the cache {kv.format.value}: expected 16-bit queries and a cache "
            "of float16, bfloat16, fp8, int8 or int4 on a GPU"
        )
    if scoring.scale <= 0:
        raise ValueError(
            f"scale is {scoring.scale}, expected a positive number such as head_dim ** -0.5"
        )
    problem = AttentionProblem(
        num_sequences=context_lens.size(0),
        num_rows=q.size(0),
        num_heads=q.size(1) // kv.head_dim,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        block_size=kv.block_size,
        max_context=block_tables.size(1) * kv.block_size,
        format=kv.format,
        window=scoring.window,
    )
    if not problem.num_rows:
        return
    launch = attention_launch(problem, gpu_target(q.device))
    run(q, kv, (block_tables, context_lens, cu_seqlens_q), scoring, out, launch)


def run(
    q: torch.Tensor,
    kv: LayerCache,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scoring: Scoring,
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
    k, v = kv.k, kv.v
    if kv.format is KvFormat.FLOAT8:
        k, v = k.view(torch.uint8), v.view(torch.uint8)  # for targets that do not know the type
    cache = (k, v, kv.k_scales, kv.v_scales, kv.k_offsets, kv.v_offsets)
    for tile in (launch.decode, launch.prefill):
        if tile is None:
            continue
        attention_kernel[tile.grid](
            q,
            *cache,
            scoring.sinks,
            out,
            sums,
            maxima,
            *batch,
            *_factors(scoring),
            scoring.window,
            q.stride(0),
            out.stride(0),
            batch[0].stride(0),
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
            scoring.sinks,
            out,
            batch[1],
            batch[2],
            scoring.window,
            out.stride(0),
            launch.num_segments,
            **merge_constants(launch),
            num_warps=1,
        )


def _factors(scoring: Scoring) -> tuple[float, float | None]:
    """What dot products are multiplied with, and the soft cap, for powers of two.

    ``c * tanh(s / c)`` is ``c - 2 c / (exp(2 s / c) + 1)``.
    """
    log2_e = math.log2(math.e)
    if scoring.soft_cap is None:
        return scoring.scale * log2_e, None
    return scoring.scale * 2 / scoring.soft_cap * log2_e, scoring.soft_cap * log2_e


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_offset_ptr, v_offset_ptr, sink_ptr,
    out_ptr, sum_ptr, maximum_ptr, table_ptr, context_ptr, start_ptr,
    scale, soft_cap, window, q_stride, out_stride, table_stride, num_sequences, num_segments,
    HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SEGMENT_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, DECODE: tl.constexpr, PARALLEL: tl.constexpr, MERGE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one KV head, over its sequence or (PARALLEL) over a segment of it.
    Scales, offsets, sinks, soft cap and window are None where there are none."""
    HALVES: tl.constexpr = k_offset_ptr is not None
    sequence, first_token, num_tokens, start = _find_tile(start_ptr, num_sequences, TOKENS, DECODE)
    if first_token >= num_tokens:
        return
    # Row r is token r // HEADS_PER_KV with head r % HEADS_PER_KV of those that share the KV head.
    rows = tl.arange(0, ROWS)
    tokens = first_token + rows // HEADS_PER_KV
    heads = tl.program_id(1) * HEADS_PER_KV + rows % HEADS_PER_KV
    has_row = (rows < TOKENS * HEADS_PER_KV) & (tokens < num_tokens)
    at = (start + tokens).to(tl.int64)
    dims = tl.arange(0, 2 * BLOCK_D if HALVES else BLOCK_D)
    mask = has_row[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + (at * q_stride + heads * HEAD_DIM)[:, None] + dims[None, :]
    queries = halve_queries(tl.load(q_ptrs, mask=mask, other=0.0), k_ptr, HEAD_DIM, BLOCK_D, HALVES)
    context = tl.load(context_ptr + sequence)
    before = context - num_tokens
    positions = before + tl.minimum(tokens, num_tokens - 1)
    first, whole, last = _find_span(
        before + first_token, before + num_tokens, window,
        TOKENS, BLOCK_SIZE, SEGMENT_BLOCKS, PARALLEL,
    )  # fmt: skip
    if first >= last:
        return
    tables = table_ptr + sequence.to(tl.int64) * table_stride
    cache = (k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_offset_ptr, v_offset_ptr)
    nothing = empty_state(ROWS, BLOCK_D, BLOCK_SIZE, HALVES)
    state, totals = _attend(
        nothing, nothing, queries, cache, tables, positions, context, scale, soft_cap, window,
        first, whole, HEAD_DIM, BLOCK_D, BLOCK_SIZE, SEGMENT_BLOCKS, False, MERGE, PTX,
    )  # fmt: skip
    state, totals = _attend(
        state, totals, queries, cache, tables, positions, context, scale, soft_cap, window,
        whole, last, HEAD_DIM, BLOCK_D, BLOCK_SIZE, SEGMENT_BLOCKS, True, MERGE, PTX,
    )  # fmt: skip
    state = close_state(state, HALVES)
    if PARALLEL:
        part = (sequence * tl.num_programs(1) * HEADS_PER_KV + heads) * num_segments
        part = part.to(tl.int64) + tl.program_id(2)
        _store_state(sum_ptr, maximum_ptr, part, state, has_row, HEAD_DIM, BLOCK_D, HALVES)
    else:
        state = merge_states(totals, state, HALVES)
        sinks = None if sink_ptr is None else tl.load(sink_ptr + heads, mask=has_row, other=0.0)
        factors, weights = mean_factors(state, sinks)
        sums = join_halves(state, HEAD_DIM, BLOCK_D, HALVES) * factors / weights
        if HALVES:
            sums = rotate_tile(sums, HEAD_DIM & -HEAD_DIM)
        out_ptrs = out_ptr + (at * out_stride + heads * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=mask)


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
def _find_span(
    row, end, window, TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SEGMENT_BLOCKS: tl.constexpr, PARALLEL: tl.constexpr,
):  # fmt: skip
    """The blocks of a tile whose first row is at position ``row`` of ``end``: the first, the first
    that is not seen whole by every row, and the end."""
    first = tl.program_id(2) * SEGMENT_BLOCKS
    if window is not None:  # of the first row; later ones see less of the beginning
        first = tl.maximum(first, (row + 1 - window) // BLOCK_SIZE)
    last = tl.cdiv(tl.minimum(row + TOKENS, end), BLOCK_SIZE)
    if PARALLEL:
        last = tl.minimum(last, (tl.program_id(2) + 1) * SEGMENT_BLOCKS)
    whole = first
    if window is None:
        whole = tl.maximum(first, tl.minimum(last, (row + 1) // BLOCK_SIZE))
    return first, whole, last


@triton.jit
def _attend(
    state, totals, queries, cache, table_ptr, positions, context, scale, soft_cap, window,
    first, last, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SEGMENT_BLOCKS: tl.constexpr, MASKED: tl.constexpr, MERGE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``state`` with blocks ``first`` to ``last - 1``, moved to ``totals`` at ends of segments."""
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_offset_ptr, v_offset_ptr = cache
    HALVES: tl.constexpr = k_offset_ptr is not None
    WIDTH: tl.constexpr = HEAD_DIM // 2 if HALVES else HEAD_DIM
    dtype: tl.constexpr = queries[0].dtype
    sums, high_sums, offset_sums, weights, maxima = state
    offsets = tl.arange(0, BLOCK_SIZE)
    element_offsets = offsets[:, None] * WIDTH + tl.arange(0, BLOCK_D)[None, :]
    has_dim = (tl.arange(0, BLOCK_D) < WIDTH)[None, :]
    for block in range(first, last):
        page = tl.load(table_ptr + block).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        elements = page * (BLOCK_SIZE * WIDTH) + element_offsets
        slots = page * BLOCK_SIZE + offsets
        at = block * BLOCK_SIZE + offsets
        scores = score_keys(
            queries, k_ptr + elements, k_scale_ptr, k_offset_ptr, slots, has_dim,
            WIDTH != BLOCK_D, PTX,
        )  # fmt: skip
        factor = scale
        if soft_cap is not None:
            inverse = 1.0 / (tl.exp2(scores * scale) + 1.0)
            scores = tl.fma(inverse, -2.0 * soft_cap, soft_cap)
            factor = 1.0
        is_written = at < context  # slots past the end hold anything, and zero times NaN is NaN
        if MASKED:
            is_seen = at[None, :] <= positions[:, None]
            if window is not None:
                is_seen &= at[None, :] > (positions - window)[:, None]
            scores = tl.where(is_seen, scores, float("-inf"))
        has_value = has_dim & is_written[:, None]
        values = load_rows(v_ptr + elements, has_value, MASKED or WIDTH != BLOCK_D)
        highest = tl.maximum(maxima, tl.max(scores, 1) * factor)
        decay, maxima = tl.exp2(maxima - highest)[:, None], highest
        p = tl.exp2(tl.fma(scores, factor, -highest[:, None]))
        weights = tl.dot(p.to(dtype), tl.full((BLOCK_SIZE, 16), 1.0, dtype), weights * decay)
        sums, high_sums, offset_sums = weigh_values(
            (sums, high_sums, offset_sums), p, decay, values, v_scale_ptr, v_offset_ptr, slots,
            is_written, dtype, MASKED, PTX,
        )  # fmt: skip
        if MERGE:  # noqa: SIM102 - the outer condition is decided at compile time
            if (block + 1) % SEGMENT_BLOCKS == 0:
                state = close_state((sums, high_sums, offset_sums, weights, maxima), HALVES)
                totals = merge_states(totals, state, HALVES)
                sums, high_sums, offset_sums, weights, maxima = empty_state(
                    sums.shape[0], BLOCK_D, BLOCK_SIZE, HALVES
                )
    return (sums, high_sums, offset_sums, weights, maxima), totals


@triton.jit
def _store_state(
    sum_ptr, maximum_ptr, part, state, has_row,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    sums, high_sums, _, weights, maxima = state
    WIDTH: tl.constexpr = HEAD_DIM // 2 if HALVES else HEAD_DIM
    dims = tl.arange(0, BLOCK_D)
    mask = has_row[:, None] & (dims < WIDTH)[None, :]
    sum_ptrs = sum_ptr + part[:, None] * HEAD_DIM + dims[None, :]
    tl.store(sum_ptrs, sums, mask=mask)
    if HALVES:
        tl.store(sum_ptrs + WIDTH, high_sums, mask=mask)
    maximum_ptrs = maximum_ptr + part * 2
    tl.store(maximum_ptrs, maxima, mask=has_row)
    tl.store(maximum_ptrs + 1, tl.max(weights, 1), mask=has_row)
