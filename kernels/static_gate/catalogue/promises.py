"""What the matmuls promise of their machine code; exceptions: docs/static-gate.md."""

from __future__ import annotations

from dataclasses import replace

import torch

from qserve.kernels.float8_matmul.launch import FLOAT8_DTYPES
from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.int4_matmul.planar4 import PLANE
from qserve.kernels.static_gate.spec import Promises
from qserve.kernels.tiled_matmul.launch import BLOCK, MatmulLaunch, rows_of_a_weight


def int4_promises(launch: MatmulLaunch, target: GpuTarget) -> Promises:
    """Of 4-bit codes and 16-bit rows."""
    few_rows = _has_few_rows(launch)
    if target.vendor is Vendor.AMD:
        # 256 lanes share a slice of 16 x 32 activations: 4 bytes each, from the second cache.
        return Promises(tensor_core="mfma", min_wide_share=0.2)
    problem = launch.problem
    easy = problem.dtype is torch.float16 and problem.in_features % BLOCK == 0
    issue = {"sm_90": 0.8 if easy else 0.95, "sm_100": 2.0}.get(target.name, 0.8)
    # A slice of 32 activations of each row, shared by all lanes, may be 8 bytes a lane, and
    # parameters are 4: both come from the second cache. The weights are always 16.
    lane_bytes = launch.tile.block_m * PLANE * 2 // (launch.tile.num_warps * 32)
    wide_share = 0.65 if lane_bytes >= 16 else 0.25 if problem.group_size == PLANE else 0.35
    return Promises(
        tensor_core=_half_family(launch, target),
        min_wide_share=wide_share,
        # More rows than 32 are bound by arithmetic, or near it.
        max_issue_share=issue if few_rows else None,
        min_warps=8,
        no_conversions=True,
    )


def int4_byte_promises(launch: MatmulLaunch, target: GpuTarget) -> Promises:
    """Of 4-bit codes and int8 rows."""
    if target.vendor is Vendor.AMD:
        return Promises(tensor_core="mfma", min_wide_share=0.35)
    few_rows = _has_few_rows(launch)
    newest = {"sm_90": "IGMMA", "sm_100": "IMMA" if launch.tile.block_n < 64 else "UTC.*MMA"}
    issue = {"sm_100": 2.0}.get(target.name, 0.8)
    return Promises(
        tensor_core=newest.get(target.name, "IMMA"),
        min_wide_share=0.5 if few_rows else None,
        max_issue_share=issue if few_rows else None,
        min_warps=8,
    )


def codebook_promises(launch: MatmulLaunch, target: GpuTarget) -> Promises:
    """Of codes that are looked up: no issue share, the look-up is too long for it on most parts."""
    if target.vendor is Vendor.AMD:
        return Promises(tensor_core="mfma", min_wide_share=0.2)
    return Promises(
        tensor_core=_half_family(launch, target),
        min_wide_share=0.3,
        min_warps=8,
        no_conversions=True,
    )


def byte_promises(launch: MatmulLaunch, target: GpuTarget) -> Promises:
    """Of codes or values of 8 bits."""
    dtype = launch.problem.dtype
    has_bytes = dtype is torch.int8 or dtype in FLOAT8_DTYPES
    few_rows = _has_few_rows(launch)
    if target.vendor is Vendor.AMD:
        return Promises(tensor_core="mfma", min_wide_share=0.3)
    family = {"sm_90": "[IQ]GMMA", "sm_100": "UTC.*MMA"}.get(target.name, "[IQ]MMA")
    narrow = target.name == "sm_90" and not has_bytes  # see the page
    return Promises(
        tensor_core=family if has_bytes else _half_family(launch, target),
        min_wide_share=(0.25 if narrow else 0.8) if few_rows else None,
        max_issue_share=(2.0 if target.name == "sm_100" else 0.8) if few_rows else None,
        min_warps=8,
        no_conversions=dtype is torch.float16 and not launch.problem.group_size,
    )


def float8_promises(launch: MatmulLaunch, target: GpuTarget) -> Promises:
    """Of values of 8 bits."""
    promises = byte_promises(launch, target)
    if target.name == "sm_80" and launch.problem.dtype is torch.bfloat16 and _has_few_rows(launch):
        return replace(promises, max_issue_share=0.85)  # values become floats by arithmetic
    return promises


def dense_promises(launch: MatmulLaunch, target: GpuTarget) -> Promises:
    """Of 16-bit weights."""
    if target.vendor is Vendor.AMD:
        # 256 lanes share 16 x 64 activations: 8 bytes each.
        return Promises(tensor_core="mfma", min_wide_share=0.75)
    few_rows = _has_few_rows(launch)
    return Promises(
        tensor_core=_half_family(launch, target),
        min_wide_share=0.9,
        max_issue_share=0.8 if few_rows else None,
        min_warps=8,
        no_conversions=True,
    )


def _has_few_rows(launch: MatmulLaunch) -> bool:
    return launch.tile.block_m <= 32 and rows_of_a_weight(launch.problem) <= 32


def _half_family(launch: MatmulLaunch, target: GpuTarget) -> str:
    newest = {"sm_90": "HGMMA", "sm_100": "HMMA" if launch.tile.block_n < 64 else "UTC.*MMA"}
    return newest.get(target.name, "HMMA")
