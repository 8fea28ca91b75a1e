"""The products with 16-bit weights and the search for the largest logits as they run, with the
width and the vocabulary of an 8B Llama."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.dense_matmul import kernel as dense_kernel
from qserve.kernels.dense_matmul import launch as dense_rule
from qserve.kernels.gpu_target import GpuTarget
from qserve.kernels.int4_matmul import kernel as int4_kernel
from qserve.kernels.int4_matmul import launch as int4_rule
from qserve.kernels.int8_matmul import kernel as int8_kernel
from qserve.kernels.int8_matmul import launch as int8_rule
from qserve.kernels.output_head import kernel as head_kernel
from qserve.kernels.output_head.launch import head_constants, head_launch
from qserve.kernels.static_gate.catalogue.promises import (
    byte_promises,
    dense_promises,
    int4_promises,
)
from qserve.kernels.static_gate.catalogue.tiles import Operands, describe_launch, tile_spec
from qserve.kernels.static_gate.spec import TRITON_NAMES, KernelSpec, Promises
from qserve.kernels.tiled_matmul import byte_launch
from qserve.kernels.tiled_matmul.launch import MatmulLaunch, MatmulProblem

_HALF, _BRAIN = torch.float16, torch.bfloat16
_WIDTH, _VOCABULARY = 4096, 128256
_INTEGERS = ("num_outputs", "num_inputs", "code_stride", "x_stride")


@dataclass(frozen=True, slots=True)
class _Head:
    """A product whose largest outputs are wanted. stream_bytes: see ``KernelSpec``."""

    name: str
    launch: MatmulLaunch
    operands: Operands
    promises: Promises
    stream_bytes: int


def head_kernels(target: GpuTarget) -> list[KernelSpec]:
    """What is launched on ``target`` for 16-bit weights and for output heads."""
    return [
        *(_dense_spec(rows, dtype, target) for rows, dtype in ((16, _HALF), (32, _BRAIN))),
        _dense_spec(2048, _BRAIN, target),
        *(_head_spec(head) for head in _heads(target)),
        _merge_spec(target),
    ]


def _heads(target: GpuTarget) -> list[_Head]:
    int4 = int4_rule.int4_launch(_problem(16, 128, _HALF), target, torch.float16)
    byte_launches = {
        "int8 g64 bf16": int8_rule.int8_launch(_problem(16, 64, _BRAIN), target),
        "int8 g64 bf16, batch": int8_rule.int8_launch(_problem(64, 64, _BRAIN), target),
    }
    dense = dense_rule.dense_launch(_problem(16, 0, _BRAIN), target)
    return [
        _Head(
            "int4 g128 fp16",
            int4,
            Operands(int4_kernel.sum_blocks, "i16", "i32"),
            int4_promises(int4, target),
            int4_rule.trip_bytes(int4),
        ),
        *(
            _Head(
                name,
                launch,
                Operands(int8_kernel.sum_blocks, "i8", "i32"),
                byte_promises(launch, target),
                byte_launch.trip_bytes(launch),
            )
            for name, launch in byte_launches.items()
        ),
        _Head(
            "bf16",
            dense,
            Operands(dense_kernel.sum_blocks, "bf16"),
            dense_promises(dense, target),
            dense_rule.trip_bytes(dense),
        ),
    ]


def _problem(rows: int, group_size: int, dtype: torch.dtype) -> MatmulProblem:
    return MatmulProblem(rows, _VOCABULARY, _WIDTH, group_size, dtype)


def _dense_spec(rows: int, dtype: torch.dtype, target: GpuTarget) -> KernelSpec:
    launch = dense_rule.dense_launch(MatmulProblem(rows, _WIDTH, _WIDTH, 0, dtype), target)
    return tile_spec(
        f"dense_matmul {TRITON_NAMES[dtype]}",
        launch,
        Operands(dense_kernel.sum_blocks, TRITON_NAMES[dtype]),
        dense_promises(launch, target),
        dense_rule.trip_bytes(launch),
    )


def _head_spec(head: _Head) -> KernelSpec:
    launch = head_launch(head.launch, 1)
    problem, tile = head.launch.problem, head.launch.tile
    pointers = {
        "x_ptr": TRITON_NAMES[problem.dtype],
        "code_ptr": head.operands.codes,
        "parameter_ptr": head.operands.parameters,
        "key_ptr": "i64",
        **dict.fromkeys(("row_scale_ptr", "channel_ptr", "bias_ptr")),
    }
    return KernelSpec(
        name=f"output_head {head.name} {problem.num_rows}x{_VOCABULARY}x{_WIDTH}",
        tile=describe_launch(launch.product),
        kernel=head_kernel.head_kernel,
        arguments={
            **{name: f"*{kind}:16" for name, kind in pointers.items() if kind},
            **dict.fromkeys(("num_rows", "blocks_per_segment", "num_kept"), "i32"),
            **dict.fromkeys(_INTEGERS, "i32:16"),
        },
        constants={
            "SUM": head.operands.sum_blocks,
            "LOGIT": head_kernel.LOGIT_DTYPES[problem.dtype],
            **head_constants(launch),
            **{name: None for name, kind in pointers.items() if not kind},
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        promises=head.promises,
        stream_bytes=head.stream_bytes,
    )


def _merge_spec(target: GpuTarget) -> KernelSpec:
    launch = head_launch(dense_rule.dense_launch(_problem(16, 0, _BRAIN), target), 20)
    return KernelSpec(
        name="output_head merge",
        tile=f"{launch.lists} lists, {launch.merge_warps} warps",
        kernel=head_kernel.merge_kernel,
        arguments={
            **dict.fromkeys(("key_ptr", "id_ptr"), "*i64:16"),
            "value_ptr": "*fp32:16",
            **dict.fromkeys(("num_lists", "num_kept", "k"), "i32"),
        },
        constants={"LISTS": launch.lists},
        num_warps=launch.merge_warps,
        num_stages=3,
        # Each trip reads the next key of one list.
        promises=Promises(),
    )
