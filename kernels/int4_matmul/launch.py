"""How the Triton int4 matmul is launched: pure functions of the shapes and the target."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import ceil

import torch

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.int4_matmul.planar4 import BLOCK, PLANE


class Unpack(Enum):
    """How codes become floating point numbers: by the compiler, or two at a time by inline PTX."""

    PLAIN = 0
    LOP3 = 1


@dataclass(frozen=True, slots=True)
class Int4Problem:
    """``[num_rows, in_features] @ [out_features, in_features].T``, in groups, in a 16-bit dtype."""

    num_rows: int
    out_features: int
    in_features: int
    group_size: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Int4Launch:
    """A launch of the matmul for ``problem``, and of the kernel that adds partial sums if any.

    block_m, block_n: rows (tokens) and outputs of a tile.
    num_segments: parts of the inputs that are summed apart and then added in order. It is a
        function of the weight's shape alone, so a row's result is the same in every batch.
    blocks_per_segment: blocks of 128 inputs in a segment.
    parallel: one thread block to a segment and partial sums in memory; otherwise one thread block
        walks all segments and adds them in registers, in the same order.
    hoist: scales multiply the float32 sum of a group; otherwise each weight, in float16.
    grid: thread blocks by (outputs, rows, segments).
    """

    problem: Int4Problem
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_segments: int
    blocks_per_segment: int
    parallel: bool
    hoist: bool
    unpack: Unpack
    grid: tuple[int, int, int]


REDUCE_BLOCK = 1024
"""Outputs that one thread block of the reduction adds up."""

_SEGMENT_TILE = 64  # outputs to a tile when segments are counted: the narrowest tile there is
_MIN_BLOCKS_PER_SEGMENT = 4  # a pipeline of 4 stages is never full in fewer trips
_CONSUMER_SHARED_BYTES = 99 * 1024
_TENSOR_MEMORY = ("sm_100", "sm_103")
_MAX_SEGMENTS = 16  # more partial sums cost more traffic than the occupancy brings


def int4_launch(problem: Int4Problem, target: GpuTarget) -> Int4Launch:
    """The launch of ``problem`` on ``target``."""
    num_segments, blocks_per_segment = _segments(problem, target)
    block_m, block_n, num_warps, num_stages = _tile(problem, num_segments, target)
    tiles = (ceil(problem.out_features / block_n), ceil(problem.num_rows / block_m))
    # Eight warps a core hide latency; beyond that, partial sums only cost traffic.
    num_warps_running = tiles[0] * tiles[1] * num_warps
    parallel = num_segments > 1 and num_warps_running < 8 * target.num_cores
    nvidia = target.vendor is Vendor.NVIDIA
    return Int4Launch(
        problem=problem,
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages if nvidia else 2,
        num_segments=num_segments,
        blocks_per_segment=blocks_per_segment,
        parallel=parallel,
        hoist=_hoists(problem),
        unpack=Unpack.LOP3 if nvidia else Unpack.PLAIN,
        grid=(*tiles, num_segments if parallel else 1),
    )


def matmul_constants(launch: Int4Launch, scale_dtype: torch.dtype) -> dict[str, int | bool]:
    """The compile-time arguments of the matmul kernel."""
    return {
        "GROUP": launch.problem.group_size,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "SEGMENTS": 1 if launch.parallel else launch.num_segments,
        "EVEN": launch.problem.in_features % BLOCK == 0,
        "HOIST": launch.hoist,
        "LOP3": launch.unpack is Unpack.LOP3,
        "BFLOAT16_SCALES": scale_dtype is torch.bfloat16,
    }


def int4_cost(problem: Int4Problem) -> Cost:
    """The work of ``problem``: codes, 4 bytes a group, activations in and out."""
    m, n, k = problem.num_rows, problem.out_features, problem.in_features
    weight = n * k // 2 + n * (k // problem.group_size) * 4
    return Cost(num_bytes=weight + 2 * m * (k + n), flops=2 * m * n * k)


def trip_bytes(launch: Int4Launch) -> int:
    """Weight bytes that one thread block takes from device memory in a trip of its hot loop."""
    num_groups = max(1, BLOCK // launch.problem.group_size)
    return launch.block_n * (BLOCK // 2 + num_groups * 4)


def _hoists(problem: Int4Problem) -> bool:
    # A bfloat16 weight would lose 2^-9 to its scale. At 32 inputs to a group a multiplication for
    # each weight is as cheap as one for each sum, and takes fewer registers.
    return problem.dtype is torch.bfloat16 or problem.group_size > PLANE


def _segments(problem: Int4Problem, target: GpuTarget) -> tuple[int, int]:
    num_blocks = ceil(problem.in_features / BLOCK)
    tiles = ceil(problem.out_features / _SEGMENT_TILE)
    wanted = ceil(2 * target.num_cores / tiles)
    most = min(_MAX_SEGMENTS, num_blocks // _MIN_BLOCKS_PER_SEGMENT)
    num_segments = max(1, min(1 << (wanted - 1).bit_length(), most))
    blocks_per_segment = ceil(num_blocks / num_segments)
    return ceil(num_blocks / blocks_per_segment), blocks_per_segment


def _is_consumer_part(target: GpuTarget) -> bool:
    return target.vendor is Vendor.NVIDIA and target.shared_bytes <= _CONSUMER_SHARED_BYTES


def _tile(problem: Int4Problem, num_segments: int, target: GpuTarget) -> tuple[int, int, int, int]:
    """Rows, outputs, warps and pipeline stages of a tile (registers: docs/static-gate.md)."""
    num_rows = problem.num_rows
    if num_rows <= 32 and target.name in _TENSOR_MEMORY:
        # A tile of 64 outputs would go through tensor memory, which costs twice the instructions of
        # the older tensor core path when the weight comes from registers.
        return (16, 32, 2, 4) if num_rows <= 16 else (32, 32, 2, 3)
    if num_rows <= 16:
        wide = ceil(problem.out_features / 128) * num_segments >= 2 * target.num_cores
        return 16, 128 if wide else 64, 4, 4
    if num_rows <= 32:
        # Four stages of four warps leave room for one thread block in a consumer part: too few.
        return (32, 128, 8, 3) if _is_consumer_part(target) else (32, 128, 4, 4)
    if _hoists(problem) and problem.group_size == PLANE and target.name.startswith("sm_12"):
        return 32, 128, 8, 3  # a tile of 64 rows, with a sum for each plane, spills there
    return 64, 128, 8, 3
