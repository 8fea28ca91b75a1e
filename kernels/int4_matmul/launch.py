"""How the Triton int4 matmul is launched: pure functions of the shapes and the target."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.int4_matmul.planar4 import PLANE
from qserve.kernels.tiled_matmul.launch import (
    BLOCK,
    MatmulLaunch,
    MatmulProblem,
    Tile,
    fills_target,
    has_tensor_memory,
    is_consumer_part,
    matmul_cost,
    plan_launch,
    rows_of_a_weight,
    stages,
)


@dataclass(frozen=True, slots=True)
class Int4Format:
    """What the tile code for 16-bit activations knows at compile time.

    group_size: inputs that share a scale. even: inputs are a multiple of 128. hoist: scales
    multiply the float32 sum of a group; otherwise each weight, in float16. assembly: codes become
    floats two at a time by inline PTX. bfloat16_scales: of the packed parameters.
    """

    group_size: int
    even: bool
    hoist: bool
    assembly: bool
    bfloat16_scales: bool


@dataclass(frozen=True, slots=True)
class Int4ByteFormat:
    """What the tile code for int8 activations knows at compile time.

    progressive: integer scales multiply the codes, products stay int8 and sums int32; otherwise
    scales multiply the sum of a block. Other names are those of ``Int4Format``.
    """

    group_size: int
    progressive: bool
    assembly: bool
    bfloat16_scales: bool


def int4_launch(
    problem: MatmulProblem, target: GpuTarget, scale_dtype: torch.dtype
) -> MatmulLaunch:
    """The launch of ``problem`` with 16-bit activations on ``target``."""
    hoists = _hoists(problem)
    format = Int4Format(
        group_size=problem.group_size,
        even=problem.in_features % BLOCK == 0,
        hoist=hoists,
        assembly=target.vendor is Vendor.NVIDIA,
        bfloat16_scales=scale_dtype is torch.bfloat16,
    )
    return plan_launch(problem, format, _tile(problem, target), target)


def int4_byte_launch(
    problem: MatmulProblem, target: GpuTarget, scale_dtype: torch.dtype, progressive: bool
) -> MatmulLaunch:
    """The launch of ``problem`` with int8 activations on ``target``.

    progressive: scales are integers that ``planar4.is_progressive`` accepts.
    """
    format = Int4ByteFormat(
        group_size=problem.group_size,
        progressive=progressive,
        assembly=target.vendor is Vendor.NVIDIA,
        bfloat16_scales=scale_dtype is torch.bfloat16,
    )
    return plan_launch(problem, format, _byte_tile(problem, target), target)


def int4_cost(problem: MatmulProblem) -> Cost:
    """The work of ``problem``: codes, 4 bytes a group, activations in and out."""
    return matmul_cost(problem, bits=4, parameter_bytes=4)


def trip_bytes(launch: MatmulLaunch) -> int:
    """Weight bytes that one thread block takes from device memory in a trip of its hot loop."""
    num_groups = max(1, BLOCK // launch.problem.group_size)
    return launch.tile.block_n * (BLOCK // 2 + num_groups * 4)


def _hoists(problem: MatmulProblem) -> bool:
    # A bfloat16 weight would lose 2^-9 to its scale. At 32 inputs to a group a multiplication for
    # each weight is as cheap as one for each sum, and takes fewer registers.
    return problem.dtype is torch.bfloat16 or problem.group_size > PLANE


def _tile(problem: MatmulProblem, target: GpuTarget) -> Tile:
    """The tile by its rows (registers: docs/static-gate.md)."""
    num_rows = rows_of_a_weight(problem)
    if num_rows <= 32 and has_tensor_memory(target):
        # A tile of 64 outputs would go through tensor memory, which costs twice the instructions of
        # the older tensor core path when the weight comes from registers.
        return Tile(16, 32, 2, 4) if num_rows <= 16 else Tile(32, 32, 2, 3)
    if num_rows <= 16:
        return Tile(16, 128 if fills_target(problem, 128, target) else 64, 4, stages(target, 4))
    if num_rows <= 32:
        # Four stages of four warps leave room for one thread block in a consumer part: too few.
        return (
            Tile(32, 128, 8, 3) if is_consumer_part(target) else Tile(32, 128, 4, stages(target, 4))
        )
    if _hoists(problem) and problem.group_size == PLANE and target.name.startswith("sm_12"):
        return Tile(32, 128, 8, 3)  # a tile of 64 rows, with a sum for each plane, spills there
    return Tile(64, 128, 8, stages(target, 3))


def _byte_tile(problem: MatmulProblem, target: GpuTarget) -> Tile:
    num_rows = problem.num_rows
    if num_rows <= 16 and has_tensor_memory(target):
        return Tile(16, 32, 2, 4)  # as for 16-bit rows
    if num_rows <= 16:
        return Tile(16, 128 if fills_target(problem, 128, target) else 64, 4, stages(target, 4))
    if num_rows <= 32:
        # Which of the two spills eight bytes differs from one consumer part to the next.
        is_older = is_consumer_part(target) and not target.name.startswith("sm_12")
        return Tile(32, 128, 8 if is_older else 4, stages(target, 3))
    return Tile(64, 128, 8, stages(target, 3))
