"""Launch rules cover every problem, fill the GPU, and keep a row's arithmetic to its shape."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
import torch

from qserve.kernels.gated_activation.launch import gate_cost, gate_grid
from qserve.kernels.gpu_target import TARGETS, GpuTarget, gpu_target
from qserve.kernels.head_norm.launch import HeadNormProblem, head_norm_cost, head_norm_launch
from qserve.kernels.kv_cache import KvFormat
from qserve.kernels.kv_store.launch import StoreProblem, store_cost, store_launch
from qserve.kernels.paged_attention import launch as attention
from qserve.kernels.paged_attention.launch import (
    AttentionProblem,
    attention_launch,
    decode_cost,
    prefill_cost,
    tile_constants,
)
from qserve.kernels.rms_norm.launch import NormProblem, norm_cost, norm_launch
from qserve.kernels.sample.launch import sample_cost
from qserve.kernels.soft_cap.launch import cap_cost, cap_grid

A100 = TARGETS["sm_80"]
BATCH = AttentionProblem(8, 8, 32, 8, 128, 64, 4096)

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@every_target
@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (8, 8), (32, 1)])
def test_attention_tiles_hold_whole_tokens(target: GpuTarget, heads: tuple[int, int]) -> None:
    problem = replace(BATCH, num_rows=100, num_heads=heads[0], num_kv_heads=heads[1])
    launch = attention_launch(problem, target)
    assert launch.prefill is not None
    for tile in (launch.decode, launch.prefill):
        assert tile.tokens * problem.heads_per_kv <= tile.rows
        assert tile.rows & (tile.rows - 1) == 0
        assert tile.grid[1] == problem.num_kv_heads


@pytest.mark.parametrize("lengths", [[1, 1, 1], [100], [1, 17, 1, 32], [16] * 9, [0, 33, 0]])
def test_prefill_tiles_suffice_for_any_lengths(lengths: list[int]) -> None:
    problem = replace(BATCH, num_sequences=len(lengths), num_rows=sum(lengths) + 1)
    tile = attention_launch(problem, A100).prefill
    assert tile is not None
    first, start = [], 0
    for index, length in enumerate(lengths):
        first.append(start // tile.tokens + index)  # as the kernel finds its sequence
        start += length
    for index, length in enumerate(lengths):
        after = first[index + 1] if index + 1 < len(lengths) else tile.grid[0]
        assert first[index] + ceil(length / tile.tokens) <= after


def test_a_batch_of_single_rows_needs_no_prefill() -> None:
    assert attention_launch(BATCH, A100).prefill is None


@every_target
def test_segments_do_not_depend_on_the_batch(target: GpuTarget) -> None:
    launches = [
        attention_launch(replace(BATCH, num_sequences=n, num_rows=rows), target)
        for n, rows in ((1, 1), (8, 8), (2000, 2000), (8, 4096))
    ]
    assert len({launch.blocks_per_segment for launch in launches}) == 1
    assert [launch.parallel for launch in launches] == [True, True, False, True]


def test_long_contexts_get_longer_segments_to_bound_the_workspace() -> None:
    assert attention_launch(replace(BATCH, max_context=16384), A100).blocks_per_segment == 4
    longer = attention_launch(replace(BATCH, max_context=131072), A100)
    assert longer.num_segments <= 64
    assert longer.blocks_per_segment * longer.num_segments * 64 >= 131072


def test_a_short_context_is_one_segment_and_never_merged() -> None:
    launch = attention_launch(replace(BATCH, max_context=256), A100)
    assert launch.num_segments == 1 and not launch.parallel
    assert not tile_constants(launch, launch.decode)["MERGE"]


@pytest.mark.parametrize(("num_heads", "head_dim"), [(32, 128), (9, 64), (1, 256), (3, 80), (1, 2)])
def test_tiles_of_heads_cover_a_row(num_heads: int, head_dim: int) -> None:
    launch = head_norm_launch(HeadNormProblem(5, num_heads, head_dim))
    assert launch.grid[0] == 5
    assert launch.grid[1] * launch.heads >= num_heads
    assert launch.block >= head_dim
    assert launch.heads * launch.block <= 1024 and launch.num_warps in (1, 2)


def test_heads_and_capped_numbers_cost_one_pass() -> None:
    assert head_norm_cost(HeadNormProblem(2, 3, 80)).num_bytes == 2 * 3 * 80 * 4
    assert cap_cost(2, 100).num_bytes == 2 * 100 * 4
    assert cap_grid(2, 1025) == (2, 2)


@pytest.mark.parametrize("block_size", [8, 24])
def test_blocks_that_no_tensor_core_takes_are_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        attention_launch(replace(BATCH, block_size=block_size), A100)


def test_rows_of_the_cache_are_padded_to_a_power_of_two() -> None:
    assert [attention.padded(width) for width in (8, 64, 80, 128)] == [16, 64, 128, 128]
    launch = attention_launch(replace(BATCH, head_dim=96, format=KvFormat.INT4), A100)
    assert tile_constants(launch, launch.decode)["BLOCK_D"] == 64
    assert attention.merge_constants(launch)["BLOCK_D"] == 128
    assert attention.merge_constants(launch)["ROTATE"]


def test_the_cost_of_decode_is_the_cache_that_it_reads() -> None:
    cost = decode_cost(BATCH, num_tokens=1000)
    assert cost.num_bytes == 2 * 2 * 1000 * 8 * 128 + 2 * 2 * 8 * 32 * 128
    assert cost.flops == 4 * 1000 * 32 * 128


def test_a_chunk_costs_each_token_with_all_before_it() -> None:
    cost = prefill_cost(BATCH, chunk=3, prefix=10)
    assert cost.flops == 4 * (11 + 12 + 13) * 32 * 128
    assert cost.num_bytes == 2 * 2 * 13 * 8 * 128 + 2 * 2 * 3 * 32 * 128
    assert attention.trip_bytes(BATCH) == 2 * 2 * 64 * 128


def test_codes_make_the_cache_cheaper_and_a_window_bounds_a_chunk() -> None:
    int8, int4 = (replace(BATCH, format=format) for format in (KvFormat.INT8, KvFormat.INT4))
    rows = 2 * 2 * 8 * 32 * 128
    assert decode_cost(int8, num_tokens=1000).num_bytes == 2 * 1000 * 8 * (128 + 2) + rows
    assert decode_cost(int4, num_tokens=1000).num_bytes == 2 * 1000 * 8 * (64 + 4) + rows
    windowed = prefill_cost(replace(BATCH, window=4), chunk=3, prefix=10)
    assert windowed.flops == 4 * (4 + 4 + 4) * 32 * 128
    assert windowed.num_bytes == 2 * 2 * 6 * 8 * 128 + 2 * 2 * 3 * 32 * 128
    assert prefill_cost(replace(BATCH, window=99), 3, 10) == prefill_cost(BATCH, 3, 10)


def test_two_warps_decode_codes_that_their_registers_hold() -> None:
    def warps(format: KvFormat, head_dim: int = 128, num_sequences: int = 8) -> int:
        problem = replace(
            BATCH, format=format, head_dim=head_dim, num_sequences=num_sequences, num_rows=8
        )
        return attention_launch(problem, A100).decode.num_warps

    assert warps(KvFormat.FLOAT16) == warps(KvFormat.INT8, 256) == 4
    assert warps(KvFormat.INT4, num_sequences=2000) == 4
    assert warps(KvFormat.INT8) == warps(KvFormat.INT4) == warps(KvFormat.FLOAT8) == 2
    small = attention_launch(replace(BATCH, format=KvFormat.INT8), TARGETS["sm_86"])
    assert small.decode.num_warps == 4


@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (1, 1, 256), (40, 40, 80)])
def test_a_store_covers_all_heads_of_all_tokens(heads: tuple[int, int, int]) -> None:
    launch = store_launch(StoreProblem(7, *heads, heads[2], 64, KvFormat.INT8))
    num_tiles = ceil(heads[0] / launch.heads) + 2 * ceil(heads[1] / launch.heads)
    assert launch.grid == (7, num_tiles)
    assert launch.heads & (launch.heads - 1) == 0 and 1 <= launch.num_warps <= 8


def test_the_cost_of_a_store_is_the_heads_and_the_rows_of_the_cache() -> None:
    cost = store_cost(StoreProblem(1, 32, 8, 128, 128, 64, KvFormat.INT4))
    heads = 2 * 128 * (2 * 32 + 3 * 8)
    assert cost.num_bytes == heads + 2 * 8 * (64 + 4) + 4 * 128 + 8


@pytest.mark.parametrize("width", [100, 576, 4096, 16384])
def test_a_norm_has_a_thread_block_for_each_row_and_columns_for_its_width(width: int) -> None:
    launch = norm_launch(NormProblem(5, width))
    assert launch.grid == (5,)
    assert launch.block >= width and launch.block & (launch.block - 1) == 0
    assert launch.num_warps <= 16


def test_the_cost_of_row_ops_is_one_pass() -> None:
    assert norm_cost(NormProblem(2, 100, has_residual=True)).num_bytes == 2 * 100 * 8
    assert norm_cost(NormProblem(2, 100, is_int8=True)).num_bytes == 2 * 100 * 3 + 2 * 4
    assert gate_cost(2, 100).num_bytes == 2 * 100 * 6
    assert gate_grid(2, 1025) == (2, 2)
    assert sample_cost(2, 100).num_bytes == 2 * 100 * 4


def test_a_cpu_is_no_target() -> None:
    with pytest.raises(ValueError, match="not a GPU"):
        gpu_target(torch.device("cpu"))
