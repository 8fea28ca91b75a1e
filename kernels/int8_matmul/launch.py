"""How the Triton int8 matmul is launched: pure functions of the shapes and the target."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.tiled_matmul.launch import (
    BLOCK,
    MatmulLaunch,
    MatmulProblem,
    Tile,
    has_tensor_memory,
    is_consumer_part,
    matmul_cost,
    plan_launch,
    rows_of_a_weight,
    stages,
)


@dataclass(frozen=True, slots=True)
class Int8Format:
    """What the tile code knows at compile time.

    group_size: inputs that share a scale; 0 for one scale an output, in the epilogue. even: inputs
    are a multiple of 128, or rows are padded to one. asymmetric: groups have zero points.
    bfloat16_scales: of the packed parameters. assembly: codes become 16-bit floats four at a time
    by inline PTX; codes for int8 rows stay as they are. step: inputs to a product.
    """

    group_size: int
    even: bool
    asymmetric: bool
    bfloat16_scales: bool
    assembly: bool
    step: int


def int8_launch(
    problem: MatmulProblem,
    target: GpuTarget,
    *,
    asymmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> MatmulLaunch:
    """The launch of ``problem`` on ``target``, for int8 or 16-bit rows."""
    has_bytes = problem.dtype is torch.int8
    group_size = problem.group_size
    format = Int8Format(
        group_size=group_size,
        even=has_bytes or problem.in_features % BLOCK == 0,
        asymmetric=asymmetric,
        bfloat16_scales=scale_dtype is torch.bfloat16,
        assembly=target.vendor is Vendor.NVIDIA,
        step=min(group_size or BLOCK, BLOCK),
    )
    tile = byte_tile(problem, target) if has_bytes else _tile(problem, target)
    return plan_launch(problem, format, tile, target)


def int8_cost(problem: MatmulProblem) -> Cost:
    """The work of ``problem``: codes, 4 bytes a group or an output, 16-bit activations."""
    return matmul_cost(problem, bits=8, parameter_bytes=4)


def trip_bytes(launch: MatmulLaunch) -> int:
    """Weight bytes that one thread block takes from device memory in a trip of its hot loop."""
    group_size = launch.problem.group_size
    num_groups = max(1, BLOCK // group_size) if group_size else 0
    return launch.tile.block_n * (BLOCK + num_groups * 4)


def byte_tile(problem: MatmulProblem, target: GpuTarget) -> Tile:
    """The tile for rows and codes of 8 bits, which the tensor cores take as they come."""
    num_rows = rows_of_a_weight(problem)
    if num_rows <= 16:
        return Tile(16, 64, 4, stages(target, 4))
    if num_rows <= 64:
        return Tile(32 if num_rows <= 32 else 64, 128, 4, stages(target, 3))
    if problem.group_size:
        return Tile(64, 128, 8, stages(target, 3))  # the sum of a group is in registers as well
    return Tile(128, 128, 8, stages(target, 2 if is_consumer_part(target) else 3))


def _tile(problem: MatmulProblem, target: GpuTarget) -> Tile:
    num_rows = rows_of_a_weight(problem)
    if num_rows <= 32 and has_tensor_memory(target):
        return Tile(16, 32, 2, 4) if num_rows <= 16 else Tile(32, 32, 2, 3)
    if num_rows <= 16:
        return Tile(16, 64, 4, stages(target, 4))
    if num_rows <= 32:
        return Tile(32, 128, 8, stages(target, 3))
    return Tile(64, 128, 8, stages(target, 3 if not is_consumer_part(target) else 2))
