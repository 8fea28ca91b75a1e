"""How the Triton float8 matmul is launched: pure functions of the shapes and the target."""

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
    tile = byte_tile(problem, target) if has_bytes else half_tile(problem, target)
    return plan_launch(problem, format, tile, target)
