"""The matmuls with 4-bit weights and of experts as they run: shapes of an 8B Llama (4096 wide), and
of a small model whose width of 576 is no multiple of 128, where that makes another kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.codebook_matmul import kernel as codebook_kernel
from qserve.kernels.codebook_matmul import launch as codebook_rule
from qserve.kernels.expert_matmul.launch import expert_launch
from qserve.kernels.gpu_target import GpuTarget
from qserve.kernels.int4_matmul import kernel as int4_kernel
from qserve.kernels.int4_matmul import launch as int4_rule
from qserve.kernels.int8_matmul import kernel as int8_kernel
from qserve.kernels.static_gate.catalogue.promises import (
    byte_promises,
    codebook_promises,
    int4_byte_promises,
    int4_promises,
)
from qserve.kernels.static_gate.catalogue.tiles import Operands, reduce_spec, tile_spec
from qserve.kernels.static_gate.spec import TRITON_NAMES, KernelSpec
from qserve.kernels.tiled_matmul import byte_launch
from qserve.kernels.tiled_matmul.launch import MatmulProblem

_HALF, _BRAIN = torch.float16, torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Case:
    rows: int
    outputs: int
    inputs: int
    group_size: int
    dtype: torch.dtype
    is_core: bool = False
    num_experts: int = 0


_INT4_CASES = (
    _Case(16, 4096, 4096, 128, _HALF, is_core=True),
    _Case(16, 4096, 4096, 64, _BRAIN),
    _Case(16, 4096, 4096, 32, _HALF),
    _Case(16, 4096, 4096, 32, _BRAIN),
    _Case(16, 28672, 4096, 128, _HALF),
    _Case(16, 576, 576, 64, _HALF),
    _Case(32, 4096, 4096, 128, _HALF),
    _Case(32, 4096, 4096, 64, _BRAIN),
    _Case(64, 576, 576, 64, _BRAIN),
    _Case(2048, 4096, 4096, 128, _HALF),
    _Case(2048, 4096, 4096, 64, _BRAIN),
    _Case(2048, 4096, 4096, 32, _BRAIN),
)
_INT4_BYTE_CASES = (
    (_Case(16, 4096, 4096, 128, _HALF), True),
    (_Case(16, 4096, 4096, 128, _HALF), False),
    (_Case(32, 4096, 4096, 128, _HALF), True),
    (_Case(2048, 4096, 4096, 128, _HALF), True),
    (_Case(2048, 4096, 4096, 128, _HALF), False),
)
"""Cases, and whether their scales are progressive."""

_CODEBOOK_CASES = (
    _Case(16, 4096, 4096, 64, _HALF),
    _Case(16, 4096, 4096, 64, _BRAIN),
    _Case(2048, 4096, 4096, 64, _BRAIN),
)
_EXPERT_CASES = (
    (_Case(16, 1536, 2048, 128, _BRAIN, num_experts=128), 4),
    (_Case(4096, 1536, 2048, 128, _BRAIN, num_experts=128), 4),
    (_Case(16, 1536, 2048, 0, _BRAIN, num_experts=128), 8),
)
"""Cases of 8 rows a token, in the shape of Qwen3-30B-A3B, and the bits of their weights."""

_NF4 = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)


def matmul_kernels(target: GpuTarget) -> list[KernelSpec]:
    """What the launch rules of the matmuls with 4-bit weights and of experts launch on
    ``target``."""
    return [
        *(_int4_spec(case, target) for case in _INT4_CASES),
        *(_int4_byte_spec(case, progressive, target) for case, progressive in _INT4_BYTE_CASES),
        *(_codebook_spec(case, target) for case in _CODEBOOK_CASES),
        *(_expert_spec(case, bits, target) for case, bits in _EXPERT_CASES),
        reduce_spec(),
    ]


def _int4_spec(case: _Case, target: GpuTarget) -> KernelSpec:
    problem = MatmulProblem(case.rows, case.outputs, case.inputs, case.group_size, case.dtype)
    launch = int4_rule.int4_launch(problem, target, torch.float16)
    return tile_spec(
        f"int4_matmul g{case.group_size} {TRITON_NAMES[case.dtype]}",
        launch,
        Operands(int4_kernel.sum_blocks, "i16", "i32"),
        int4_promises(launch, target),
        int4_rule.trip_bytes(launch),
        is_core=case.is_core,
    )


def _int4_byte_spec(case: _Case, progressive: bool, target: GpuTarget) -> KernelSpec:
    problem = MatmulProblem(case.rows, case.outputs, case.inputs, case.group_size, torch.int8)
    launch = int4_rule.int4_byte_launch(problem, target, torch.float16, progressive)
    scales = "progressive" if progressive else "per group"
    return tile_spec(
        f"int4_matmul int8 rows {scales} g{case.group_size}",
        launch,
        Operands(int4_kernel.sum_byte_blocks, "i8", "i32", ("row_scale_ptr",), "fp16"),
        int4_byte_promises(launch, target),
        int4_rule.trip_bytes(launch),
        is_core=case.is_core,
    )


def _codebook_spec(case: _Case, target: GpuTarget) -> KernelSpec:
    problem = MatmulProblem(case.rows, case.outputs, case.inputs, case.group_size, case.dtype)
    launch = codebook_rule.codebook_launch(problem, target, _NF4)
    return tile_spec(
        f"codebook_matmul g{case.group_size} {TRITON_NAMES[case.dtype]}",
        launch,
        Operands(codebook_kernel.sum_blocks, "i16", "fp32"),
        codebook_promises(launch, target),
        codebook_rule.trip_bytes(launch),
        is_core=case.is_core,
    )


def _expert_spec(case: _Case, bits: int, target: GpuTarget) -> KernelSpec:
    problem = MatmulProblem(
        case.rows, case.outputs, case.inputs, case.group_size, case.dtype, case.num_experts
    )
    launch = expert_launch(problem, target, bits=bits)
    dtype = TRITON_NAMES[case.dtype]
    if bits == 8:
        operands = Operands(int8_kernel.sum_blocks, "i8", None, ("channel_ptr",))
        promises, stream_bytes = byte_promises(launch, target), byte_launch.trip_bytes(launch)
    else:
        operands = Operands(int4_kernel.sum_blocks, "i16", "i32")
        promises, stream_bytes = int4_promises(launch, target), int4_rule.trip_bytes(launch)
    name = f"expert_matmul int{bits} {dtype}"
    return tile_spec(name, launch, operands, promises, stream_bytes, is_core=case.is_core)
