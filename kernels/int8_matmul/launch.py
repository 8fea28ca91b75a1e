"""How the Triton int8 matmul is launched: pure functions of the shapes and the target."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.tiled_matmul.byte_launch import byte_tile, half_tile
from qserve.kernels.tiled_matmul.launch import (
    BLOCK,
    MatmulLaunch,
    MatmulProblem,
    plan_launch,
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
    tile = byte_tile(problem, target) if has_bytes else half_tile(problem, target)
    return plan_launch(problem, format, tile, target)
