"""What the launches of weights of one byte share, int8 and float8."""

from __future__ import annotations

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget
from qserve.kernels.tiled_matmul.launch import (
    BLOCK,
    MatmulLaunch,
    MatmulProblem,
    Tile,
    has_tensor_memory,
    is_consumer_part,
    matmul_cost,
    rows_of_a_weight,
    stages,
)


def byte_cost(problem: MatmulProblem) -> Cost:
    """The work of ``problem``: bytes, 4 more a group or an output, 16-bit activations."""
    return matmul_cost(problem, bits=8, parameter_bytes=4)


def trip_bytes(launch: MatmulLaunch) -> int:
    """Weight bytes that one thread block takes from device memory in a trip of its hot loop."""
    group_size = launch.problem.group_size
    num_groups = max(1, BLOCK // group_size) if group_size else 0
    return launch.tile.block_n * (BLOCK + num_groups * 4)


def byte_tile(problem: MatmulProblem, target: GpuTarget) -> Tile:
    """The tile for rows of 8 bits too, which the tensor cores take as they come."""
    num_rows = rows_of_a_weight(problem)
    if num_rows <= 16:
        return Tile(16, 64, 4, stages(target, 4))
    if num_rows <= 64:
        return Tile(32 if num_rows <= 32 else 64, 128, 4, stages(target, 3))
    if problem.group_size:
        return Tile(64, 128, 8, stages(target, 3))  # the sum of a group is in registers as well
    return Tile(128, 128, 8, stages(target, 2 if is_consumer_part(target) else 3))


def half_tile(problem: MatmulProblem, target: GpuTarget) -> Tile:
    """The tile for rows of 16 bits."""
    num_rows = rows_of_a_weight(problem)
    if num_rows <= 32 and has_tensor_memory(target):
        return Tile(16, 32, 2, 4) if num_rows <= 16 else Tile(32, 32, 2, 3)
    if num_rows <= 16:
        return Tile(16, 64, 4, stages(target, 4))
    if num_rows <= 32:
        return Tile(32, 128, 8, stages(target, 3))
    return Tile(64, 128, 8, stages(target, 2 if is_consumer_part(target) else 3))
