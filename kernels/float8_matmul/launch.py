"""How the Triton float8 matmul is launched: pure functions of the shapes and the target."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.int8_matmul.launch import byte_tile
from qserve.kernels.tiled_matmul.launch import (
    BLOCK,
    MatmulLaunch,
    MatmulProblem,
    Tile,
    has_tensor_memory,
    is_consumer_part,
    matmul_cost,
    plan_launch,
    stages,
)

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_WITHOUT_FLOAT8 = ("sm_80", "sm_86", "sm_87")
_HALVED = ("gfx942",)  # AMD's first tensor cores for float8 take the form with half the values


@dataclass(frozen=True, slots=True)
class Float8Format:
    """What the tile code knows at compile time.

    group_size: inputs that share a scale; 0 for one scale an output, in the epilogue. even: inputs
    are a multiple of 128, or rows are padded to one. as_bits: the target knows no float8, values
    come as int8 and become 16-bit floats by inline PTX (``assembly``) or shifts. step: inputs to a
    product.
    """

    group_size: int
    even: bool
    as_bits: bool
    assembly: bool
    step: int


def float8_dtype(target: GpuTarget) -> torch.dtype:
    """The float8 that ``target`` computes with: e4m3, its FNUZ form, or none: int8 for the bits."""
    if target.name in _WITHOUT_FLOAT8:
        return torch.int8
    return torch.float8_e4m3fnuz if target.name in _HALVED else torch.float8_e4m3fn


def float8_launch(problem: MatmulProblem, target: GpuTarget) -> MatmulLaunch:
    """The launch of ``problem`` on ``target``, for rows of float8 or 16 bits."""
    has_bytes = problem.dtype in FLOAT8_DTYPES
    as_bits = float8_dtype(target) is torch.int8
    format = Float8Format(
        group_size=problem.group_size,
        even=has_bytes or problem.in_features % BLOCK == 0,
        as_bits=as_bits,
        assembly=as_bits and target.vendor is Vendor.NVIDIA,
        step=min(problem.group_size or BLOCK, BLOCK),
    )
    tile = byte_tile(problem, target) if has_bytes else _tile(problem, target)
    return plan_launch(problem, format, tile, target)


def float8_cost(problem: MatmulProblem) -> Cost:
    """The work of ``problem``: values, 4 bytes a group or an output, 16-bit activations."""
    return matmul_cost(problem, bits=8, parameter_bytes=4)


def trip_bytes(launch: MatmulLaunch) -> int:
    """Weight bytes that one thread block takes from device memory in a trip of its hot loop."""
    group_size = launch.problem.group_size
    num_groups = max(1, BLOCK // group_size) if group_size else 0
    return launch.tile.block_n * (BLOCK + num_groups * 4)


def _tile(problem: MatmulProblem, target: GpuTarget) -> Tile:
    if problem.num_rows <= 32 and has_tensor_memory(target):
        return Tile(16, 32, 2, 4) if problem.num_rows <= 16 else Tile(32, 32, 2, 3)
    if problem.num_rows <= 16:
        return Tile(16, 64, 4, stages(target, 4))
    if problem.num_rows <= 32:
        return Tile(32, 128, 8, stages(target, 3))
    return Tile(64, 128, 8, stages(target, 2 if is_consumer_part(target) else 3))
