"""The matmuls with weights of 8 bits as they run, in the shapes of an 8B Llama."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.float8_matmul import kernel as float8_kernel
from qserve.kernels.float8_matmul import launch as float8_rule
from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.int8_matmul import kernel as int8_kernel
from qserve.kernels.int8_matmul import launch as int8_rule
from qserve.kernels.quantize_tokens import kernel as token_kernel
from qserve.kernels.static_gate.catalogue.promises import byte_promises, float8_promises
from qserve.kernels.static_gate.catalogue.tiles import Operands, tile_spec
from qserve.kernels.static_gate.spec import TRITON_NAMES, KernelSpec, Promises
from qserve.kernels.tiled_matmul import byte_launch
from qserve.kernels.tiled_matmul.launch import MatmulProblem

_HALF, _BRAIN = torch.float16, torch.bfloat16
_SHAPE = (4096, 4096)


@dataclass(frozen=True, slots=True)
class _Case:
    """group_size: 0 for one scale an output. dtype: of the rows; None for float8 or int8."""

    rows: int
    group_size: int
    dtype: torch.dtype | None
    asymmetric: bool = False
    is_core: bool = False


_INT8_CASES = (
    _Case(16, 0, _HALF),
    _Case(16, 64, _BRAIN),
    _Case(16, 128, _HALF, asymmetric=True),
    _Case(2048, 0, _HALF),
    _Case(32, 64, _BRAIN),
    _Case(16, 0, None, is_core=True),
    _Case(32, 0, None),
    _Case(64, 0, None),
    _Case(2048, 0, None),
)
_FLOAT8_CASES = (
    _Case(16, 0, _HALF),
    _Case(16, 128, _BRAIN),
    _Case(32, 128, _BRAIN),
    _Case(16, 0, None),
    _Case(32, 0, None),
    _Case(2048, 128, None),
)


def byte_kernels(target: GpuTarget) -> list[KernelSpec]:
    """What the launch rules of the matmuls with 8-bit weights launch on ``target``."""
    has_float8 = float8_rule.float8_dtype(target) is not torch.int8
    return [
        *(_int8_spec(case, target) for case in _INT8_CASES),
        *(
            _float8_spec(case, target)
            for case in _FLOAT8_CASES
            if has_float8 or case.dtype is not None
        ),
        _token_spec(torch.int8, target),
        *([_token_spec(float8_rule.float8_dtype(target), target)] if has_float8 else []),
    ]


def _int8_spec(case: _Case, target: GpuTarget) -> KernelSpec:
    problem = MatmulProblem(case.rows, *_SHAPE, case.group_size, case.dtype or torch.int8)
    launch = int8_rule.int8_launch(problem, target, asymmetric=case.asymmetric)
    parameters = "i32" if case.group_size else None
    epilogue = () if case.group_size else ("channel_ptr",)
    return tile_spec(
        f"int8_matmul {_describe(case, 'int8')}",
        launch,
        _operands(case, int8_kernel.sum_blocks, "i8", parameters, epilogue),
        byte_promises(launch, target),
        byte_launch.trip_bytes(launch),
        is_core=case.is_core,
    )


def _float8_spec(case: _Case, target: GpuTarget) -> KernelSpec:
    dtype = float8_rule.float8_dtype(target)
    problem = MatmulProblem(case.rows, *_SHAPE, case.group_size, case.dtype or dtype)
    launch = float8_rule.float8_launch(problem, target)
    parameters = "fp32" if case.group_size else None
    epilogue = () if case.group_size else ("channel_ptr",)
    return tile_spec(
        f"float8_matmul {_describe(case, 'float8')}",
        launch,
        _operands(case, float8_kernel.sum_blocks, TRITON_NAMES[dtype], parameters, epilogue),
        float8_promises(launch, target),
        byte_launch.trip_bytes(launch),
        is_core=case.is_core,
    )


def _operands(
    case: _Case, sum_blocks: object, codes: str, parameters: str | None, epilogue: tuple[str, ...]
) -> Operands:
    if case.dtype is None:  # rounded rows
        return Operands(sum_blocks, codes, parameters, ("row_scale_ptr", *epilogue), "fp16")
    return Operands(sum_blocks, codes, parameters, epilogue)


def _describe(case: _Case, rounded: str) -> str:
    rows = TRITON_NAMES[case.dtype] if case.dtype else f"{rounded} rows"
    scales = f"g{case.group_size}" if case.group_size else "channels"
    return f"{scales}{' zero points' if case.asymmetric else ''} {rows}"


def _token_spec(dtype: torch.dtype, target: GpuTarget) -> KernelSpec:
    activations = Activations.FLOAT8_TOKEN
    if dtype is torch.int8:
        activations = Activations.INT8_TOKEN
    return KernelSpec(
        name=f"quantize_tokens to {TRITON_NAMES[dtype]}",
        tile="1 row, 4 warps",
        kernel=token_kernel.quantize_kernel,
        arguments={
            "x_ptr": "*fp16:16",
            "code_ptr": f"*{TRITON_NAMES[dtype]}:16",
            "scale_ptr": "*fp32:16",
            **dict.fromkeys(("num_inputs", "width", "x_stride"), "i32:16"),
        },
        constants=token_kernel.row_constants(activations, dtype, planar=False),
        num_warps=4,
        num_stages=3,
        # AMD's 256 lanes load 8 bytes each of the 1024 inputs at a time.
        promises=Promises(min_wide_share=0.9 if target.vendor is Vendor.NVIDIA else None),
    )
