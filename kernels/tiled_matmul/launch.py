"""How a Triton matmul is cut into tiles and segments: pure functions of the shapes and the target.

A tile is computed transposed, ``weight @ x.T``: its outputs are the rows of a tensor core
instruction, so 16 tokens are enough, and each weight is unpacked by one warp only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget, Vendor

BLOCK = 128
"""Inputs to a block, the step of every loop; weights are padded to a multiple of it."""

REDUCE_BLOCK = 1024
"""Outputs that one thread block of the reduction adds up."""

_SEGMENT_TILE = 64  # outputs to a tile when segments are counted: the narrowest tile there is
_MIN_BLOCKS_PER_SEGMENT = 4  # a pipeline of 4 stages is never full in fewer trips
_MAX_SEGMENTS = 16  # more partial sums cost more traffic than the occupancy brings
_CONSUMER_SHARED_BYTES = 99 * 1024
_TENSOR_MEMORY = ("sm_100", "sm_103")


@dataclass(frozen=True, slots=True)
class MatmulProblem:
    """``[num_rows, in_features] @ [out_features, in_features].T``

    group_size: inputs that share a scale inside the loop; 0 when all scales are in the epilogue.
    dtype: of the rows as the kernel reads them: float16, bfloat16, int8 or a float8.
    num_experts: weights that rows choose among; 0 when there is one for all. A row then is counted
        for each expert that it is sent to.
    """

    num_rows: int
    out_features: int
    in_features: int
    group_size: int
    dtype: torch.dtype
    num_experts: int = 0


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows (tokens) and outputs of a tile, and what computes it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class MatmulLaunch:
    """A launch of the matmul for ``problem``, and of the kernel that adds partial sums if any.

    format: what the tile code of the format has to know at compile time.
    num_segments: parts of the inputs that are summed apart and then added in order. It is a
        function of the weight's shape alone, so a row's result is the same in every batch.
    blocks_per_segment: blocks of inputs in a segment.
    parallel: one thread block to a segment and partial sums in memory; otherwise one thread block
        walks all segments and adds them in registers, in the same order.
    grid: thread blocks by (outputs, rows, segments).
    """

    problem: MatmulProblem
    format: Any
    tile: Tile
    num_segments: int
    blocks_per_segment: int
    parallel: bool
    grid: tuple[int, int, int]


def plan_launch(problem: MatmulProblem, format: Any, tile: Tile, target: GpuTarget) -> MatmulLaunch:
    """The launch of ``problem`` in tiles of one kind on ``target``."""
    num_segments, blocks_per_segment = count_segments(problem, target)
    tiles = (ceil(problem.out_features / tile.block_n), count_row_tiles(problem, tile.block_m))
    # Eight warps a core hide latency; beyond that, partial sums only cost traffic.
    num_warps_running = tiles[0] * tiles[1] * tile.num_warps
    parallel = num_segments > 1 and num_warps_running < 8 * target.num_cores
    return MatmulLaunch(
        problem=problem,
        format=format,
        tile=tile,
        num_segments=num_segments,
        blocks_per_segment=blocks_per_segment,
        parallel=parallel,
        grid=(*tiles, num_segments if parallel else 1),
    )


def count_segments(problem: MatmulProblem, target: GpuTarget) -> tuple[int, int]:
    """Segments of the inputs, and blocks to a segment; none is empty."""
    num_blocks = ceil(problem.in_features / BLOCK)
    tiles = ceil(problem.out_features / _SEGMENT_TILE)
    wanted = ceil(2 * target.num_cores / tiles)
    most = min(_MAX_SEGMENTS, num_blocks // _MIN_BLOCKS_PER_SEGMENT)
    num_segments = max(1, min(1 << (wanted - 1).bit_length(), most))
    blocks_per_segment = ceil(num_blocks / num_segments)
    return ceil(num_blocks / blocks_per_segment), blocks_per_segment


def count_row_tiles(problem: MatmulProblem, block_m: int) -> int:
    """Tiles of rows; with experts as many as can be needed."""
    if not problem.num_experts:
        return ceil(problem.num_rows / block_m)
    return count_tiles(problem.num_rows, problem.num_experts, block_m)


def count_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """Tiles that suffice however rows are shared out: each expert may leave one in part empty."""
    return num_rows // block_m + min(num_rows, num_experts)


def fills_target(problem: MatmulProblem, block_n: int, target: GpuTarget) -> bool:
    """Whether one row of tiles of ``block_n`` outputs gives each core two thread blocks."""
    num_segments, _ = count_segments(problem, target)
    return ceil(problem.out_features / block_n) * num_segments >= 2 * target.num_cores


def matmul_constants(launch: MatmulLaunch, rows_per_token: int = 1) -> dict[str, Any]:
    """The compile-time arguments of the matmul kernel, but for the tile code of the format.

    rows_per_token: rows of the problem that read the same row of activations.
    """
    return {
        "FORMAT": launch.format,
        "ROWS_PER_TOKEN": rows_per_token,
        "BLOCK_M": launch.tile.block_m,
        "BLOCK_N": launch.tile.block_n,
        "SEGMENTS": 1 if launch.parallel else launch.num_segments,
    }


def matmul_cost(problem: MatmulProblem, bits: int, parameter_bytes: int) -> Cost:
    """The work of ``problem``: codes of ``bits``, ``parameter_bytes`` for each group or, without
    groups, for each output, and 16-bit activations in and out.

    Of several experts, as many are read as rows can choose.
    """
    m, n, k = problem.num_rows, problem.out_features, problem.in_features
    num_groups = k // problem.group_size if problem.group_size else 1
    weight = n * k * bits // 8 + n * num_groups * parameter_bytes
    num_weights = min(m, problem.num_experts) if problem.num_experts else 1
    return Cost(num_bytes=num_weights * weight + 2 * m * (k + n), flops=2 * m * n * k)


def is_consumer_part(target: GpuTarget) -> bool:
    """Whether a thread block has the little shared memory of NVIDIA's consumer parts."""
    return target.vendor is Vendor.NVIDIA and target.shared_bytes <= _CONSUMER_SHARED_BYTES


def has_tensor_memory(target: GpuTarget) -> bool:
    """Whether tensor cores work on a memory of their own (data centre Blackwell)."""
    return target.name in _TENSOR_MEMORY


def stages(target: GpuTarget, num_stages: int) -> int:
    """Stages of a software pipeline: AMD's compiler keeps two, in registers."""
    return num_stages if target.vendor is Vendor.NVIDIA else 2


def rows_of_a_weight(problem: MatmulProblem) -> int:
    """Rows that one weight multiplies: of several experts, what each gets when all are equal."""
    if not problem.num_experts:
        return problem.num_rows
    return ceil(problem.num_rows / problem.num_experts)
