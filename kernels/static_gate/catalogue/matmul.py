"""The matmuls as they run: shapes of an 8B Llama (4096 wide), and of a small model whose width of
576 is no multiple of 128, where that makes another kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.int4_matmul import kernel as int4_kernel
from qserve.kernels.int4_matmul import launch as int4_rule
from qserve.kernels.int4_matmul.launch import Int4Launch, Int4Problem
from qserve.kernels.int4_matmul.planar4 import BLOCK, PLANE
from qserve.kernels.static_gate.spec import TRITON_NAMES, KernelSpec, Promises

_HALF, _BRAIN = torch.float16, torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Int4Case:
    rows: int
    outputs: int
    inputs: int
    group_size: int
    dtype: torch.dtype
    is_core: bool = False


_INT4_CASES = (
    _Int4Case(16, 4096, 4096, 128, _HALF, is_core=True),
    _Int4Case(16, 4096, 4096, 128, _BRAIN),
    _Int4Case(16, 4096, 4096, 64, _HALF),
    _Int4Case(16, 4096, 4096, 64, _BRAIN, is_core=True),
    _Int4Case(16, 4096, 4096, 32, _HALF),
    _Int4Case(16, 4096, 4096, 32, _BRAIN),
    _Int4Case(16, 28672, 4096, 128, _HALF),
    _Int4Case(16, 576, 576, 64, _HALF),
    _Int4Case(16, 576, 576, 32, _BRAIN),
    _Int4Case(32, 4096, 4096, 128, _HALF),
    _Int4Case(32, 4096, 4096, 64, _BRAIN),
    _Int4Case(32, 4096, 4096, 32, _HALF),
    _Int4Case(32, 4096, 4096, 32, _BRAIN),
    _Int4Case(64, 4096, 4096, 128, _HALF),
    _Int4Case(64, 4096, 4096, 64, _BRAIN),
    _Int4Case(64, 4096, 4096, 32, _HALF),
    _Int4Case(64, 576, 576, 64, _BRAIN),
    _Int4Case(2048, 4096, 4096, 128, _HALF, is_core=True),
    _Int4Case(2048, 4096, 4096, 64, _BRAIN),
    _Int4Case(2048, 4096, 4096, 32, _HALF),
    _Int4Case(2048, 4096, 4096, 32, _BRAIN),
)
_INT4_INTEGERS = ("num_outputs", "num_inputs", "word_stride", "x_stride", "out_stride")


def matmul_kernels(target: GpuTarget) -> list[KernelSpec]:
    """What the launch rules of the matmuls launch on ``target``."""
    return [*(_int4_spec(case, target) for case in _INT4_CASES), _reduce_spec()]


def _int4_spec(case: _Int4Case, target: GpuTarget) -> KernelSpec:
    problem = Int4Problem(case.rows, case.outputs, case.inputs, case.group_size, case.dtype)
    launch = int4_rule.int4_launch(problem, target)
    dtype = TRITON_NAMES[case.dtype]
    arguments = {
        "x_ptr": f"*{dtype}:16",
        "word_ptr": "*i16:16",
        "parameter_ptr": "*i32:16",
        "out_ptr": "*fp32:16" if launch.parallel else f"*{dtype}:16",
        "num_rows": "i32",
        "blocks_per_segment": "i32",
        **dict.fromkeys(_INT4_INTEGERS, "i32:16"),
    }
    return KernelSpec(
        name=f"int4_matmul {case.rows}x{case.outputs}x{case.inputs} g{case.group_size} {dtype}",
        tile=_int4_tile(launch),
        kernel=int4_kernel.matmul_kernel,
        arguments=arguments,
        constants=int4_rule.matmul_constants(launch, torch.float16),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        promises=_int4_promises(launch, target),
        stream_bytes=int4_rule.trip_bytes(launch),
        is_core=case.is_core,
    )


def _int4_tile(launch: Int4Launch) -> str:
    segments = f", {launch.num_segments} segments" if launch.num_segments > 1 else ""
    order = " in parallel" if launch.parallel else ""
    return f"{launch.block_m}x{launch.block_n}, {launch.num_warps} warps{segments}{order}"


def _int4_promises(launch: Int4Launch, target: GpuTarget) -> Promises:
    few_rows = launch.block_m <= 32 and launch.problem.num_rows <= 32
    if target.vendor is Vendor.AMD:
        # 256 lanes share a slice of 16 x 32 activations: 4 bytes each, from the second cache.
        return Promises(tensor_core="mfma", min_wide_share=0.2)
    tensor_core = {"sm_90": "HGMMA", "sm_100": "HMMA" if few_rows else "UTC.*MMA"}
    problem = launch.problem
    easy = problem.dtype is torch.float16 and problem.in_features % BLOCK == 0
    issue = {"sm_90": 0.8 if easy else 0.95, "sm_100": 2.0}.get(target.name, 0.8)
    # A slice of 32 activations of each row, shared by all lanes, may be 8 bytes a lane, and
    # parameters are 4: both come from the second cache. The weights are always 16.
    lane_bytes = launch.block_m * PLANE * 2 // (launch.num_warps * 32)
    wide_share = 0.65 if lane_bytes >= 16 else 0.25 if problem.group_size == PLANE else 0.35
    return Promises(
        tensor_core=tensor_core.get(target.name, "HMMA"),
        min_wide_share=wide_share,
        # More rows than 32 are bound by arithmetic, or near it.
        max_issue_share=issue if few_rows else None,
        min_warps=8,
        no_conversions=True,
    )


def _reduce_spec() -> KernelSpec:
    return KernelSpec(
        name="int4_matmul reduce fp16",
        tile=f"{int4_rule.REDUCE_BLOCK}",
        kernel=int4_kernel.reduce_kernel,
        arguments={
            "partial_ptr": "*fp32:16",
            "out_ptr": "*fp16:16",
            **dict.fromkeys(("num_outputs", "segment_stride", "out_stride"), "i32:16"),
        },
        constants={"NUM_SEGMENTS": 4, "BLOCK": int4_rule.REDUCE_BLOCK},
        num_warps=4,
        num_stages=2,
        promises=Promises(min_wide_share=0.9),
    )
