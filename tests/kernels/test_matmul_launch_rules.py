"""Launch rules of the matmuls cover every problem, fill the GPU, and keep a row's arithmetic to its
shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil

import pytest
import torch

from qserve.kernels.codebook_matmul.launch import codebook_cost, codebook_launch
from qserve.kernels.codebook_matmul.launch import trip_bytes as codebook_trip_bytes
from qserve.kernels.dense_matmul.launch import dense_cost, dense_launch
from qserve.kernels.dense_matmul.launch import trip_bytes as dense_trip_bytes
from qserve.kernels.expert_matmul.launch import expert_cost, expert_launch
from qserve.kernels.float8_matmul.launch import float8_dtype, float8_launch
from qserve.kernels.gpu_target import TARGETS, GpuTarget, Vendor
from qserve.kernels.int4_matmul.launch import int4_byte_launch, int4_cost, int4_launch
from qserve.kernels.int4_matmul.launch import trip_bytes as int4_trip_bytes
from qserve.kernels.int8_matmul.launch import int8_launch
from qserve.kernels.output_head.launch import head_cost, head_launch
from qserve.kernels.tiled_matmul.byte_launch import byte_cost
from qserve.kernels.tiled_matmul.byte_launch import trip_bytes as byte_trip_bytes
from qserve.kernels.tiled_matmul.launch import (
    MatmulLaunch,
    MatmulProblem,
    count_tiles,
    matmul_constants,
)

A100 = TARGETS["sm_80"]
HALF = torch.float16
LAYER = MatmulProblem(1, 4096, 4096, 128, HALF)
ROWS = (1, 16, 17, 32, 33, 64, 500, 4096)

Rule = Callable[[MatmulProblem, GpuTarget], MatmulLaunch]
RULES: dict[str, Rule] = {
    "int4": partial(int4_launch, scale_dtype=HALF),
    "int4 of int8 rows": partial(int4_byte_launch, scale_dtype=HALF, progressive=True),
    "int8": int8_launch,
    "int8 of int8 rows": lambda problem, target: int8_launch(
        replace(problem, dtype=torch.int8), target
    ),
    "float8": float8_launch,
    "codebook": partial(codebook_launch, codebook=(0.0,) * 16),
    "dense": lambda problem, target: dense_launch(replace(problem, group_size=0), target),
}

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_target
@every_rule
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (576, 1536), (100, 32)])
def test_a_grid_covers_all_rows_outputs_and_inputs(
    shape: tuple[int, int], rule: Rule, target: GpuTarget
) -> None:
    for num_rows in ROWS:
        launch = rule(MatmulProblem(num_rows, *shape, 32, torch.bfloat16), target)
        assert launch.grid[0] * launch.tile.block_n >= shape[0]
        assert launch.grid[1] * launch.tile.block_m >= num_rows
        num_blocks = ceil(shape[1] / 128)
        covered = launch.num_segments * launch.blocks_per_segment
        assert covered - launch.blocks_per_segment < num_blocks <= covered  # none is empty
        assert launch.grid[2] == (launch.num_segments if launch.parallel else 1)


@every_target
@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_what_a_row_goes_through_does_not_depend_on_the_rows_beside_it(
    group_size: int, dtype: torch.dtype, rule: Rule, target: GpuTarget
) -> None:
    problem = replace(LAYER, dtype=dtype, group_size=group_size)
    launches = [rule(replace(problem, num_rows=rows), target) for rows in ROWS]
    orders = {(x.num_segments, x.blocks_per_segment, x.format) for x in launches}
    assert len(orders) == 1


@every_rule
def test_few_rows_are_cut_into_segments_until_the_gpu_is_full(rule: Rule) -> None:
    small = rule(replace(LAYER, out_features=1024), A100)
    assert small.parallel and small.num_segments > 1
    assert matmul_constants(small)["SEGMENTS"] == 1
    assert not rule(replace(LAYER, out_features=65536), A100).parallel
    many = rule(replace(LAYER, num_rows=4096), A100)
    assert not many.parallel
    assert matmul_constants(many)["SEGMENTS"] == many.num_segments


def test_a_scale_never_multiplies_a_bfloat16_weight() -> None:
    for group_size in (32, 64, 128):
        problem = replace(LAYER, dtype=torch.bfloat16, group_size=group_size)
        assert int4_launch(problem, A100, HALF).format.hoist


@every_target
@pytest.mark.parametrize("name", [name for name in RULES if name != "dense"])
def test_inline_assembly_is_for_nvidia_alone(name: str, target: GpuTarget) -> None:
    assert not RULES[name](LAYER, target).format.assembly or target.vendor is Vendor.NVIDIA


@pytest.mark.parametrize("name", ["int4", "int8", "float8", "codebook"])
def test_a_format_says_when_the_last_block_is_not_full(name: str) -> None:
    assert RULES[name](LAYER, A100).format.even
    assert not RULES[name](replace(LAYER, in_features=576), A100).format.even


def test_each_target_gets_the_float8_that_it_computes_with() -> None:
    found = {name: float8_dtype(target) for name, target in TARGETS.items()}
    assert found["sm_80"] is found["sm_86"] is torch.int8
    assert found["sm_89"] is found["sm_100"] is torch.float8_e4m3fn
    assert found["gfx942"] is torch.float8_e4m3fnuz
    assert float8_launch(LAYER, A100).format.as_bits


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("counts", [[5, 0, 1], [16, 16, 16], [17, 33, 1], [0, 0, 1]])
def test_expert_tiles_suffice_however_rows_are_shared_out(counts: list[int], top_k: int) -> None:
    counts = counts * top_k
    needed = sum(ceil(count / 16) for count in counts)
    assert needed <= count_tiles(sum(counts), len(counts), 16)


@every_target
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_are_launched_in_tiles_of_the_rows_each_gets(bits: int, target: GpuTarget) -> None:
    problem = replace(LAYER, num_rows=512, num_experts=64)
    launch = expert_launch(problem, target, bits=bits)
    alone = RULES[f"int{bits}"](replace(LAYER, num_rows=8), target)
    assert launch.tile == alone.tile
    assert launch.grid[1] == 512 // launch.tile.block_m + 64


def test_the_cost_of_a_matmul_is_its_weight_and_its_activations() -> None:
    problem = MatmulProblem(2, 300, 256, 128, HALF)
    assert int4_cost(problem).flops == 2 * 2 * 300 * 256
    activations = 2 * 2 * (300 + 256)
    assert int4_cost(problem).num_bytes == 300 * 256 // 2 + 300 * 2 * 4 + activations
    assert codebook_cost(problem) == int4_cost(problem)
    assert byte_cost(problem).num_bytes == 300 * 256 + 300 * 2 * 4 + activations
    channels = replace(problem, group_size=0)
    assert byte_cost(channels).num_bytes == 300 * 256 + 300 * 4 + activations
    assert expert_cost(replace(problem, num_experts=9), 4).num_bytes == (
        2 * (300 * 256 // 2 + 300 * 2 * 4) + activations
    )


def test_one_row_is_bound_by_memory_and_many_by_arithmetic() -> None:
    bandwidth, peak = 2.0e12, 3.0e14
    one, many = int4_cost(LAYER), int4_cost(replace(LAYER, num_rows=4096))
    assert one.bound_s(bandwidth, peak) == one.num_bytes / bandwidth
    assert many.bound_s(bandwidth, peak) == many.flops / peak


def test_a_trip_reads_a_block_of_each_output() -> None:
    problem = replace(LAYER, group_size=64)
    nibbles, codes = RULES["int4"](problem, A100), RULES["int8"](problem, A100)
    assert int4_trip_bytes(nibbles) == nibbles.tile.block_n * (64 + 2 * 4)
    assert codebook_trip_bytes(nibbles) == int4_trip_bytes(nibbles)
    assert byte_trip_bytes(codes) == codes.tile.block_n * (128 + 2 * 4)
    channels = RULES["int8"](replace(LAYER, group_size=0), A100)
    assert byte_trip_bytes(channels) == channels.tile.block_n * 128


@every_target
@every_rule
@pytest.mark.parametrize("k", [1, 20, 500])
def test_a_head_is_summed_as_the_product_by_one_thread_block_a_tile(
    k: int, rule: Rule, target: GpuTarget
) -> None:
    product = rule(replace(LAYER, out_features=1000), target)
    launch = head_launch(product, k)
    assert launch.product.num_segments == product.num_segments and not launch.product.parallel
    assert launch.product.grid == (*product.grid[:2], 1)
    assert launch.kept == min(k, product.tile.block_n)
    assert launch.num_tiles == product.grid[0] <= launch.lists < 2 * launch.num_tiles
    assert launch.lists <= 32 * 8 * launch.merge_warps


def test_a_head_writes_keys_in_place_of_logits() -> None:
    problem = MatmulProblem(2, 6400, 256, 0, HALF)
    launch = head_launch(dense_launch(problem, A100), 3)
    keys = 2 * 8 * 2 * launch.num_tiles * 3
    assert head_cost(dense_cost(problem), launch).num_bytes == 2 * 6400 * 256 + 2 * 2 * 256 + keys
    assert dense_trip_bytes(launch.product) == launch.product.tile.block_n * 128 * 2


@every_target
def test_two_thread_blocks_of_float_weights_fit_a_core(target: GpuTarget) -> None:
    for num_rows in ROWS:
        tile = dense_launch(MatmulProblem(num_rows, 4096, 4096, 0, HALF), target).tile
        stage = 2 * 128 * (tile.block_m + tile.block_n)
        warps = tile.num_warps * (target.shared_bytes // (stage * tile.num_stages))
        assert warps >= 8 or target.vendor is Vendor.AMD
