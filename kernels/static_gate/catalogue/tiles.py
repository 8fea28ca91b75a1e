"""A launch of the tiled matmul as the gate compiles it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qserve.kernels.static_gate.spec import TRITON_NAMES, KernelSpec, Promises
from qserve.kernels.tiled_matmul import kernel as tiled_kernel
from qserve.kernels.tiled_matmul.launch import (
    REDUCE_BLOCK,
    MatmulLaunch,
    matmul_constants,
)

_INTEGERS = ("num_outputs", "num_inputs", "num_groups", "code_stride", "x_stride", "out_stride")
_EPILOGUE = ("row_scale_ptr", "channel_ptr", "bias_ptr")
_ROUTING = ("slot_ptr", "expert_ptr")
_ROWS_PER_TOKEN = 8


@dataclass(frozen=True, slots=True)
class Operands:
    """What a kind of product reads.

    sum_blocks: its tile code. codes, parameters: types of the elements, as Triton writes them;
    None for no group parameters. epilogue: the scales and the bias that it has.
    out: type of the result; that of the rows when None.
    """

    sum_blocks: Any
    codes: str
    parameters: str | None = None
    epilogue: tuple[str, ...] = ()
    out: str | None = None


def tile_spec(
    name: str,
    launch: MatmulLaunch,
    operands: Operands,
    promises: Promises,
    stream_bytes: int,
    is_core: bool = False,
) -> KernelSpec:
    """The matmul kernel as ``launch`` runs it. stream_bytes: see ``KernelSpec``."""
    problem = launch.problem
    dtype = TRITON_NAMES[problem.dtype]
    out = "fp32" if launch.parallel else operands.out or dtype
    pointers = {
        "x_ptr": dtype,
        "code_ptr": operands.codes,
        "parameter_ptr": operands.parameters,
        "out_ptr": out,
        **{
            name: "fp32" if name in operands.epilogue and not launch.parallel else None
            for name in _EPILOGUE
        },
        **dict.fromkeys(_ROUTING, "i32" if problem.num_experts else None),
    }
    return KernelSpec(
        name=f"{name} {problem.num_rows}x{problem.out_features}x{problem.in_features}",
        tile=describe_launch(launch),
        kernel=tiled_kernel.matmul_kernel,
        arguments={
            **{name: f"*{kind}:16" for name, kind in pointers.items() if kind},
            "num_rows": "i32",
            "blocks_per_segment": "i32",
            **dict.fromkeys(_INTEGERS, "i32:16"),
        },
        constants={
            "SUM": operands.sum_blocks,
            **matmul_constants(launch, _ROWS_PER_TOKEN if problem.num_experts else 1),
            **{name: None for name, kind in pointers.items() if not kind},
        },
        num_warps=launch.tile.num_warps,
        num_stages=launch.tile.num_stages,
        promises=promises,
        stream_bytes=stream_bytes,
        is_core=is_core,
    )


def reduce_spec() -> KernelSpec:
    """The kernel that adds partial sums, with a bias and outer scales."""
    return KernelSpec(
        name="tiled_matmul reduce fp16",
        tile=f"{REDUCE_BLOCK}",
        kernel=tiled_kernel.reduce_kernel,
        arguments={
            "partial_ptr": "*fp32:16",
            "out_ptr": "*fp16:16",
            **dict.fromkeys(("channel_ptr", "bias_ptr"), "*fp32:16"),
            **dict.fromkeys(("num_outputs", "segment_stride", "out_stride"), "i32:16"),
        },
        constants={
            "NUM_SEGMENTS": 4,
            "BLOCK": REDUCE_BLOCK,
            "row_scale_ptr": None,
            "expert_ptr": None,
        },
        num_warps=4,
        num_stages=2,
        # Scales and bias are read at most once, clamped to the last output.
        promises=Promises(min_wide_share=0.6),
    )


def describe_launch(launch: MatmulLaunch) -> str:
    """Tile, warps and segments of ``launch``, in words."""
    tile = launch.tile
    segments = f", {launch.num_segments} segments" if launch.num_segments > 1 else ""
    order = " in parallel" if launch.parallel else ""
    return f"{tile.block_m}x{tile.block_n}, {tile.num_warps} warps{segments}{order}"
