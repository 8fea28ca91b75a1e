"""The Triton paged attention over caches of 8 and 4 bits, with windows, soft caps and sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from qserve.kernels.gpu_target import TARGETS
from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.kv_codes import encode
from qserve.kernels.paged_attention import kernel, reference
from qserve.kernels.paged_attention.launch import (
    AttentionLaunch,
    AttentionProblem,
    TileLaunch,
    attention_launch,
)
from qserve.kernels.paged_attention.scoring import Scoring

HALF, BRAIN = torch.float16, torch.bfloat16
BLOCK_SIZE = 16
QUANTIZED = (KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4)


@dataclass(frozen=True, slots=True)
class Batch:
    """Queries of some sequences over a cache whose unused slots are NaN."""

    q: torch.Tensor
    kv: LayerCache
    lengths: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    scoring: Scoring


def make_cache(
    format: KvFormat, contexts: Sequence[int], heads: int, head_dim: int
) -> tuple[LayerCache, torch.Tensor]:
    """A cache whose numbers have a mean, and its block tables, in no order."""
    generator = torch.Generator().manual_seed(sum(contexts))
    blocks = [-(-context // BLOCK_SIZE) for context in contexts]
    order = torch.randperm(sum(blocks) + 1, generator=generator).int()
    kv = LayerCache.allocate(format, sum(blocks) + 1, heads, BLOCK_SIZE, head_dim)
    tables = torch.full((len(contexts), max(blocks) + 1), 2**30, dtype=torch.int32)
    parts = ((kv.k, kv.k_scales, kv.k_offsets), (kv.v, kv.v_scales, kv.v_offsets))
    for codes, scales, offsets in parts:
        if codes.is_floating_point():
            codes.fill_(float("nan"))
        for numbers in (scales, offsets):
            if numbers is not None:
                numbers.fill_(float("nan"))
    for i, context in enumerate(contexts):
        tables[i, : blocks[i]] = order[sum(blocks[:i]) : sum(blocks[: i + 1])]
        slots = torch.arange(context)
        pages, places = tables[i].long()[slots // BLOCK_SIZE], slots % BLOCK_SIZE
        for part in parts:
            rows = torch.randn(context, heads, head_dim, generator=generator) + 0.5
            for target, numbers in zip(part, encode(rows, format), strict=True):
                if target is not None and numbers is not None:
                    target[pages, :, places] = numbers
    return kv, tables


def make_batch(
    num_queries: Sequence[int],
    contexts: Sequence[int],
    format: KvFormat,
    dtype: torch.dtype = HALF,
    shape: tuple[int, int, int] = (4, 2, 16),
    **scoring: Any,
) -> Batch:
    """Sequences with ``num_queries`` new of ``contexts`` tokens. shape: query heads, KV heads and
    their size."""
    num_heads, num_kv_heads, head_dim = shape
    kv, tables = make_cache(format, contexts, num_kv_heads, head_dim)
    starts = torch.tensor([0, *num_queries]).cumsum(0).int()
    generator = torch.Generator().manual_seed(num_heads)
    q = torch.randn(sum(num_queries), num_heads * head_dim, generator=generator).to(dtype)
    lengths = (tables, torch.tensor(contexts).int(), starts)
    return Batch(q, kv, lengths, Scoring(scale=head_dim**-0.5, **scoring))


def make_launch(
    batch: Batch, *, parallel: bool, blocks_per_segment: int = 2, ptx: bool = True
) -> AttentionLaunch:
    """The rule's launch with short segments and small tiles."""
    tables, contexts, _ = batch.lengths
    kv, num_sequences = batch.kv, contexts.size(0)
    problem = AttentionProblem(
        num_sequences=num_sequences,
        num_rows=batch.q.size(0),
        num_heads=batch.q.size(1) // kv.head_dim,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        block_size=BLOCK_SIZE,
        max_context=tables.size(1) * BLOCK_SIZE,
        format=kv.format,
        window=batch.scoring.window,
    )
    num_segments = -(-tables.size(1) // blocks_per_segment)
    tokens = 16 // problem.heads_per_kv
    prefill_grid = (batch.q.size(0) // tokens + num_sequences, kv.num_kv_heads, 1)
    decode_grid = (num_sequences, kv.num_kv_heads, num_segments if parallel else 1)
    return AttentionLaunch(
        problem=problem,
        blocks_per_segment=blocks_per_segment,
        num_segments=num_segments,
        parallel=parallel,
        ptx=ptx,
        decode=TileLaunch(16, 1, 4, 2, decode_grid),
        prefill=TileLaunch(16, tokens, 4, 2, prefill_grid),
    )


def attend(batch: Batch, launch: AttentionLaunch) -> torch.Tensor:
    """The kernel's output in a matrix full of NaN: what it does not write cannot pass."""
    out = torch.full_like(batch.q, float("nan"))
    kernel.run(batch.q, batch.kv, batch.lengths, batch.scoring, out, launch)
    return out


def error(out: torch.Tensor, batch: Batch) -> float:
    """The largest difference from the definition, in steps of the dtype at the size of the values
    (up to 3.5).

    Each of these rounds by at most half a unit in the last place, and what it does is seen rotated
    back, where no value is above 3.5: weights, or their products with scales, before they meet the
    values (half a step); weights before they are summed (half a step); rotated queries (less than a
    fifth, found); the output (half a step). They are independent: 0.4 was found at most, in any
    format at any size of head. Float32 and the definition itself add 0.0005 (found in float64).
    """
    expected = torch.empty(batch.q.shape)
    reference.paged_attention(batch.q.float(), batch.kv, *batch.lengths, batch.scoring, expected)
    step = torch.finfo(batch.q.dtype).eps * 3.5
    return float(((out.float() - expected).abs() / step).nan_to_num(nan=1e9).max())


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("format", QUANTIZED)
def test_a_quantized_cache_is_read_as_what_it_stands_for(
    format: KvFormat, dtype: torch.dtype
) -> None:
    batch = make_batch([1, 5], [33, 7], format, dtype)
    assert error(attend(batch, make_launch(batch, parallel=True)), batch) < 1


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("format", QUANTIZED)
def test_the_assembly_has_an_equal(format: KvFormat, dtype: torch.dtype, parallel: bool) -> None:
    batch = make_batch([1, 5, 1], [33, 19, 4], format, dtype)
    launches = [make_launch(batch, parallel=parallel, ptx=ptx) for ptx in (True, False)]
    assert torch.equal(attend(batch, launches[0]), attend(batch, launches[1]))


@pytest.mark.parametrize(("format", "head_dim"), [(KvFormat.INT4, 80), (KvFormat.INT8, 96)])
def test_head_dimensions_need_not_be_a_power_of_two(format: KvFormat, head_dim: int) -> None:
    batch = make_batch([1, 3], [18, 20], format, shape=(2, 1, head_dim))
    assert error(attend(batch, make_launch(batch, parallel=True)), batch) < 1


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("format", [KvFormat.FLOAT16, *QUANTIZED])
def test_every_head_dimension_over_every_format(
    format: KvFormat, dtype: torch.dtype, head_dim: int
) -> None:
    if format is KvFormat.FLOAT16 and dtype is BRAIN:
        format = KvFormat.BFLOAT16
    batch = make_batch([1, 9, 1], [40, 20, 17], format, dtype, (6, 2, head_dim))
    for parallel in (True, False):
        assert error(attend(batch, make_launch(batch, parallel=parallel)), batch) < 1


@pytest.mark.parametrize(("window", "parallel"), [(1, True), (16, False), (17, True)])
def test_a_row_sees_its_window_and_no_more(window: int, parallel: bool) -> None:
    batch = make_batch([1, 9, 1], [70, 30, 3], KvFormat.FLOAT16, window=window)
    launch = make_launch(batch, parallel=parallel)
    assert error(attend(batch, launch), batch) < 1
    wider = replace(batch, scoring=replace(batch.scoring, window=window + 1))
    assert error(attend(wider, launch), batch) > 2


@pytest.mark.parametrize(("format", "parallel"), [(KvFormat.FLOAT16, True), (KvFormat.INT4, False)])
def test_scores_are_capped_and_sinks_join_the_weights(format: KvFormat, parallel: bool) -> None:
    sinks = torch.tensor([2.0, -1.0, 40.0, 0.0])
    batch = make_batch([1, 7], [40, 23], format, soft_cap=0.7, sinks=sinks, window=25)
    launch = make_launch(batch, parallel=parallel)
    assert error(attend(batch, launch), batch) < 1
    uncapped = replace(batch.scoring, soft_cap=None)
    without_sinks = replace(batch.scoring, sinks=None)
    for scoring in (uncapped, without_sinks):
        assert error(attend(replace(batch, scoring=scoring), launch), batch) > 2


slow_but_for_one = pytest.mark.parametrize(
    "format",
    [*(pytest.param(f, marks=pytest.mark.slow) for f in QUANTIZED[:-1]), QUANTIZED[-1]],
)


@slow_but_for_one
def test_a_row_is_the_same_decoded_in_any_order_of_segments_and_in_a_chunk(
    format: KvFormat,
) -> None:
    chunk = make_batch([5], [45], format, window=40, sinks=torch.zeros(4))
    rows = attend(chunk, make_launch(chunk, parallel=False))
    for row in (0, 4):
        lengths = (chunk.lengths[0], torch.tensor([41 + row]).int(), torch.tensor([0, 1]).int())
        one = replace(chunk, q=chunk.q[row : row + 1], lengths=lengths)
        for parallel in (True, False):
            launch = replace(make_launch(one, parallel=parallel), prefill=None)
            assert torch.equal(attend(one, launch)[0], rows[row])


@slow_but_for_one
def test_the_rules_own_launch_computes_attention(format: KvFormat) -> None:
    batch = make_batch([1, 7], [50, 40], format)
    problem = make_launch(batch, parallel=True).problem
    assert error(attend(batch, attention_launch(problem, TARGETS["sm_90"])), batch) < 1


@pytest.mark.parametrize("name", ["k", "v", "k_scales", "v_scales", "k_offsets", "v_offsets"])
def test_a_code_or_number_that_changes_is_noticed(name: str) -> None:
    batch = make_batch([1], [6], KvFormat.INT4)
    out = attend(batch, make_launch(batch, parallel=True, blocks_per_segment=1))
    numbers = getattr(batch.kv, name)
    page = int(batch.lengths[0][0, 0])
    numbers[page, :, 2] += 0.3 if numbers.is_floating_point() else 1
    assert error(out, batch) > 1


@pytest.mark.parametrize("parallel", [True, False])
def test_the_mean_of_a_large_head_is_no_less_exact(parallel: bool) -> None:
    # It gathers in one rotated element, and the offsets of the others make up for its range.
    batch = make_batch([1, 3], [40, 17], KvFormat.INT4, BRAIN, (2, 1, 256))
    assert error(attend(batch, make_launch(batch, parallel=parallel)), batch) < 0.6


@pytest.mark.parametrize(
    ("format", "dtype", "head_dim"), [(KvFormat.INT8, HALF, 16), (KvFormat.INT4, BRAIN, 256)]
)
def test_a_code_off_by_one_is_noticed(format: KvFormat, dtype: torch.dtype, head_dim: int) -> None:
    batch = make_batch([1], [1], format, dtype, (4, 2, head_dim))
    out = attend(batch, make_launch(batch, parallel=True, blocks_per_segment=1))
    batch.kv.v[int(batch.lengths[0][0, 0]), :, 0] ^= 1
    assert error(out, batch) > 1
