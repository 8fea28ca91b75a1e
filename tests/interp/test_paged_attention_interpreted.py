"""The Triton paged attention agrees with its definition, in every variant a launch can ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from qserve.kernels.gpu_target import TARGETS
from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.paged_attention import Scoring, kernel, reference
from qserve.kernels.paged_attention.launch import (
    AttentionLaunch,
    AttentionProblem,
    TileLaunch,
    attention_launch,
)

DTYPES = (torch.float16, torch.bfloat16)
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Queries of some sequences over a cache whose unused slots are NaN."""

    q: torch.Tensor
    kv: LayerCache
    tables: torch.Tensor
    contexts: torch.Tensor
    starts: torch.Tensor
    num_heads: int

    @property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.tables, self.contexts, self.starts

    @property
    def scoring(self) -> Scoring:
        return Scoring(scale=float(self.kv.head_dim**-0.5))


def make_batch(
    num_queries: Sequence[int],
    contexts: Sequence[int],
    dtype: torch.dtype = torch.float16,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
) -> Batch:
    """Sequences with ``num_queries`` new of ``contexts`` tokens, in blocks in no order."""
    generator = torch.Generator().manual_seed(sum(contexts))
    num_heads, num_kv_heads = heads
    blocks = [-(-context // BLOCK_SIZE) for context in contexts]
    order = torch.randperm(sum(blocks) + 1, generator=generator).int()
    tables = torch.full((len(contexts), max(blocks) + 1), 2**30, dtype=torch.int32)
    shape = (sum(blocks) + 1, num_kv_heads, BLOCK_SIZE, head_dim)
    k, v = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    for i, context in enumerate(contexts):
        tables[i, : blocks[i]] = order[sum(blocks[:i]) : sum(blocks[: i + 1])]
        for token in range(context):
            page, offset = int(tables[i, token // BLOCK_SIZE]), token % BLOCK_SIZE
            for cache in (k, v):
                row = torch.randn(num_kv_heads, head_dim, generator=generator)
                cache[page, :, offset] = row.to(dtype)
    starts = torch.tensor([0, *num_queries]).cumsum(0).int()
    q = torch.randn(sum(num_queries), num_heads * head_dim, generator=generator).to(dtype)
    return Batch(q, LayerCache(k, v), tables, torch.tensor(contexts).int(), starts, num_heads)


def make_problem(batch: Batch) -> AttentionProblem:
    return AttentionProblem(
        num_sequences=batch.contexts.size(0),
        num_rows=batch.q.size(0),
        num_heads=batch.num_heads,
        num_kv_heads=batch.kv.num_kv_heads,
        head_dim=batch.kv.head_dim,
        block_size=BLOCK_SIZE,
        max_context=batch.tables.size(1) * BLOCK_SIZE,
    )


def make_launch(
    batch: Batch, *, parallel: bool, blocks_per_segment: int, rows: int = 16
) -> AttentionLaunch:
    """The rule's launch with short segments and small tiles."""
    problem = make_problem(batch)
    num_sequences = problem.num_sequences
    kv_heads = problem.num_kv_heads
    num_segments = -(-batch.tables.size(1) // blocks_per_segment)
    tokens = rows // (batch.num_heads // kv_heads)
    prefill_grid = (batch.q.size(0) // tokens + num_sequences, kv_heads, 1)
    decode_grid = (num_sequences, kv_heads, num_segments if parallel else 1)
    return AttentionLaunch(
        problem=problem,
        blocks_per_segment=blocks_per_segment,
        num_segments=num_segments,
        parallel=parallel,
        ptx=True,
        decode=TileLaunch(16, 1, 4, 2, decode_grid),
        prefill=TileLaunch(rows, tokens, 4, 2, prefill_grid),
    )


def attend(batch: Batch, launch: AttentionLaunch) -> torch.Tensor:
    """The kernel's output in a matrix full of NaN: what it does not write cannot pass."""
    out = torch.full_like(batch.q, float("nan"))
    kernel.run(batch.q, batch.kv, batch.lengths, batch.scoring, out, launch)
    return out


def error(out: torch.Tensor, batch: Batch) -> float:
    """The largest difference from the definition, in steps of the dtype at the size of the values.

    Weights are rounded to the dtype before they meet the values, and their sum is of rounded ones:
    the error is a mean of values up to about 3, each off by half a step, and one last rounding.
    """
    expected = torch.empty(batch.q.shape)
    kv = LayerCache(batch.kv.k.float(), batch.kv.v.float())
    reference.paged_attention(batch.q.float(), kv, *batch.lengths, batch.scoring, expected)
    step = torch.finfo(batch.q.dtype).eps * 3
    return float(((out.float() - expected).abs() / step).nan_to_num(nan=1e9).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parallel", [True, False])
def test_decode_over_contexts_that_end_anywhere(dtype: torch.dtype, parallel: bool) -> None:
    batch = make_batch([1, 1, 1, 1], [1, 16, 17, 70], dtype)
    launch = replace(make_launch(batch, parallel=parallel, blocks_per_segment=2), prefill=None)
    assert error(attend(batch, launch), batch) < 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parallel", [True, False])
def test_prefill_and_decode_in_one_batch(dtype: torch.dtype, parallel: bool) -> None:
    batch = make_batch([1, 9, 1, 5, 0], [35, 19, 4, 22, 3], dtype)
    launch = make_launch(batch, parallel=parallel, blocks_per_segment=1)
    assert error(attend(batch, launch), batch) < 1


@pytest.mark.parametrize("heads", [(9, 3), (2, 2), (20, 1)])
def test_any_number_of_heads_may_share_keys(heads: tuple[int, int]) -> None:
    batch = make_batch([1, 11], [20, 27], heads=heads)
    rows = 32 if heads[0] // heads[1] > 16 else 16
    launch = make_launch(batch, parallel=True, blocks_per_segment=1, rows=rows)
    launch = replace(launch, decode=replace(launch.decode, rows=rows))
    assert error(attend(batch, launch), batch) < 1


@pytest.mark.parametrize("head_dim", [24, 64])
def test_head_dimensions_need_not_be_a_power_of_two(head_dim: int) -> None:
    batch = make_batch([1, 3], [18, 20], heads=(2, 1), head_dim=head_dim)
    launch = make_launch(batch, parallel=True, blocks_per_segment=1)
    assert error(attend(batch, launch), batch) < 1


def test_queries_may_lie_apart_and_so_may_outputs() -> None:
    batch = make_batch([1, 4], [9, 18])
    width = batch.q.size(1)
    qkv = torch.cat([batch.q, torch.full_like(batch.q, float("nan"))], 1)
    apart = replace(batch, q=qkv[:, :width])
    out = torch.full_like(qkv, 7.0)
    launch = make_launch(batch, parallel=True, blocks_per_segment=1)
    kernel.run(apart.q, apart.kv, apart.lengths, apart.scoring, out[:, :width], launch)
    assert error(out[:, :width], batch) < 1
    assert bool((out[:, width:] == 7.0).all())


def test_segments_merged_in_parallel_and_in_turn_agree_to_the_bit() -> None:
    batch = make_batch([1, 1], [50, 17])
    apart = attend(batch, make_launch(batch, parallel=True, blocks_per_segment=2))
    together = attend(batch, make_launch(batch, parallel=False, blocks_per_segment=2))
    assert torch.equal(apart, together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_decoded_and_in_a_chunk(dtype: torch.dtype) -> None:
    chunk = make_batch([11], [50], dtype)
    launch = make_launch(chunk, parallel=False, blocks_per_segment=2)
    rows = attend(chunk, launch)
    for row in (0, 6, 10):
        one = replace(
            chunk,
            q=chunk.q[row : row + 1],
            contexts=torch.tensor([40 + row]).int(),
            starts=torch.tensor([0, 1]).int(),
        )
        alone = attend(one, make_launch(one, parallel=True, blocks_per_segment=2))
        assert torch.equal(alone[0], rows[row])


def test_the_rules_own_launch_computes_attention() -> None:
    batch = make_batch([1, 7], [50, 40])
    launch = attention_launch(make_problem(batch), TARGETS["sm_80"])
    assert error(attend(batch, launch), batch) < 1


@pytest.mark.parametrize("position", [0, 15, 16, 39])
def test_a_value_that_changes_is_noticed(position: int) -> None:
    batch = make_batch([1], [40])
    out = attend(batch, make_launch(batch, parallel=True, blocks_per_segment=1))
    page = int(batch.tables[0, position // BLOCK_SIZE])
    batch.kv.v[page, :, position % BLOCK_SIZE] += 1.0
    assert error(out, batch) > 2


def test_a_key_that_changes_is_noticed() -> None:
    batch = make_batch([3], [30])
    out = attend(batch, make_launch(batch, parallel=False, blocks_per_segment=1))
    batch.kv.k[int(batch.tables[0, 1]), :, 3] *= -1
    assert error(out, batch) > 2
