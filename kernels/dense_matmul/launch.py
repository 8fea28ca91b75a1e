"""How the Triton matmul with float weights is launched: pure functions of the shapes and the
target."""

from __future__ import annotations

from dataclasses import dataclass

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget
from qserve.kernels.tiled_matmul.launch import (
    BLOCK,
    MatmulLaunch,
    MatmulProblem,
    Tile,
    is_consumer_part,
    matmul_cost,
    plan_launch,
    stages,
)

STEP = 64
"""Inputs to a product: two of them are a block."""


@dataclass(frozen=True, slots=True)
class DenseFormat:
    """What the tile code knows at compile time.

    even: inputs are a multiple of 128.
    """

    even: bool


def dense_launch(problem: MatmulProblem, target: GpuTarget) -> MatmulLaunch:
    """The launch of ``problem``, whose group size is 0, on ``target``."""
    format = DenseFormat(even=problem.in_features % BLOCK == 0)
    return plan_launch(problem, format, _tile(problem, target), target)


def dense_cost(problem: MatmulProblem) -> Cost:
    """The work of ``problem`` with weights of 16 bits."""
    return matmul_cost(problem, bits=16, parameter_bytes=0)


def trip_bytes(launch: MatmulLaunch) -> int:
    """Weight bytes that one thread block takes from device memory in a trip of its hot loop."""
    return launch.tile.block_n * BLOCK * 2


def _tile(problem: MatmulProblem, target: GpuTarget) -> Tile:
    # A stage is 16 KiB of weights and more of rows: two thread blocks have to fit a core.
    few, some = (2, 2) if is_consumer_part(target) else (stages(target, 4), stages(target, 3))
    if problem.num_rows <= 16:
        return Tile(16, 64, 4, few)
    if problem.num_rows <= 32:
        return Tile(32, 64, 4, some)
    return Tile(64, 128, 8, some)
