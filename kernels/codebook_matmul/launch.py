"""How the Triton codebook matmul is launched: pure functions of the shapes and the target."""

from __future__ import annotations

from dataclasses import dataclass

from qserve.kernels.codebook_matmul.lookup_ptx import table_words
from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.tiled_matmul.launch import (
    BLOCK,
    MatmulLaunch,
    MatmulProblem,
    Tile,
    has_tensor_memory,
    matmul_cost,
    plan_launch,
    stages,
)


@dataclass(frozen=True, slots=True)
class CodebookFormat:
    """What the tile code knows at compile time.

    group_size: 32, 64 or a multiple of 128. even: inputs are a multiple of 128. assembly: codes are
    looked up four at a time by inline PTX. codebook: the 16 values. table: the same for the PTX.
    """

    group_size: int
    even: bool
    assembly: bool
    codebook: tuple[float, ...]
    table: tuple[int, ...]


def codebook_launch(
    problem: MatmulProblem, target: GpuTarget, codebook: tuple[float, ...]
) -> MatmulLaunch:
    """The launch of ``problem`` on ``target``."""
    format = CodebookFormat(
        group_size=problem.group_size,
        even=problem.in_features % BLOCK == 0,
        assembly=target.vendor is Vendor.NVIDIA,
        codebook=codebook,
        table=table_words(codebook, problem.dtype),
    )
    return plan_launch(problem, format, _tile(problem, target), target)


def codebook_cost(problem: MatmulProblem) -> Cost:
    """The work of ``problem``: codes, a float32 for each block of a row, 16-bit activations."""
    return matmul_cost(problem, bits=4, parameter_bytes=4)


def trip_bytes(launch: MatmulLaunch) -> int:
    """Weight bytes that one thread block takes from device memory in a trip of its hot loop."""
    num_groups = max(1, BLOCK // launch.problem.group_size)
    return launch.tile.block_n * (BLOCK // 2 + num_groups * 4)


def _tile(problem: MatmulProblem, target: GpuTarget) -> Tile:
    if problem.num_rows <= 32 and has_tensor_memory(target):
        return Tile(16, 32, 2, 4) if problem.num_rows <= 16 else Tile(32, 32, 2, 3)
    if problem.num_rows <= 16:
        return Tile(16, 64, 4, stages(target, 4))
    if problem.num_rows <= 32 or target.name.startswith("sm_12"):  # 64 rows spill there
        return Tile(32, 128, 8, stages(target, 3))
    return Tile(64, 128, 8, stages(target, 3))
