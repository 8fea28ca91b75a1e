"""The matmul in Triton, for NVIDIA and AMD, around the tile code of a format.

``out = (x @ codes.T) * row_scales * channel_scales + bias``, where the format's tile code knows
what codes and group parameters stand for.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.tiled_matmul.launch import REDUCE_BLOCK, MatmulLaunch, matmul_constants
from qserve.kernels.tiled_matmul.routing import Routing


@dataclass(frozen=True, slots=True)
class TiledWeight:
    """A weight on a GPU; of experts, all of them, one after the other.

    codes: ``[N, stride]``, or ``[E, N, stride]``. parameters: ``[G, N]`` or ``[E, G, N]``, read
    once for each group of inputs. channel_scales, bias: float32 ``[N]`` or ``[E, N]``.
    """

    codes: torch.Tensor
    parameters: torch.Tensor | None = None
    channel_scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def to(self, device: torch.device) -> TiledWeight:
        """The weight on ``device``, its bias in float32."""

        def move(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(device)

        bias = None if self.bias is None else self.bias.float()
        return TiledWeight(
            self.codes.to(device), move(self.parameters), move(self.channel_scales), move(bias)
        )

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.parameters, self.channel_scales, self.bias)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, slots=True)
class TiledProduct:
    """Rows and the weight they are multiplied with, ready to be launched.

    rows: ``[num_rows, K]``, rows contiguous, 16-byte aligned. sum_blocks: the tile code of the
    weight's format. row_scales: float32 ``[num_rows]``. With ``routing``, rows are those of its
    slots.
    """

    rows: torch.Tensor
    weight: TiledWeight
    launch: MatmulLaunch
    sum_blocks: Any
    row_scales: torch.Tensor | None = None
    routing: Routing | None = None


def pack_tiles(
    weight: Any,
    tiled: TiledWeight,
    arrange: Callable[[torch.Tensor, Activations], TiledProduct],
) -> PackedWeight:
    """A neutral ``weight`` that is ``tiled``. arrange: the product of it with rows, which it rounds
    as the activations say."""

    def multiply(x: torch.Tensor, out: torch.Tensor, activations: Activations) -> None:
        run(arrange(x, activations), out)

    return PackedWeight(
        in_features=weight.in_features,
        out_features=weight.out_features,
        nbytes=tiled.nbytes,
        backend=Backend.TRITON,
        run=multiply,
        arrange=arrange,
    )


def check_half(x: torch.Tensor) -> None:
    """Raises ``TypeError`` unless ``x`` is float16 or bfloat16."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}, expected float16 or bfloat16 on a GPU: cast it before")


def run(product: TiledProduct, out: torch.Tensor) -> None:
    """Writes ``product`` to ``out [num_rows, N]``, rows contiguous."""
    weight, launch, routing = product.weight, product.launch, product.routing
    num_rows, num_outputs = out.shape
    if not num_rows:
        return
    target, row_stride = out, out.stride(0)
    epilogue = (product.row_scales, weight.channel_scales, weight.bias)
    if launch.parallel:
        target = torch.empty(
            (launch.num_segments, num_rows, num_outputs), dtype=torch.float32, device=out.device
        )
        row_stride = num_outputs
    slots, tile_experts = (routing.slots, routing.tile_experts) if routing else (None, None)
    num_groups = weight.parameters.shape[-2] if weight.parameters is not None else 0
    matmul_kernel[launch.grid](
        product.rows,
        weight.codes,
        weight.parameters,
        target,
        *((None, None, None) if launch.parallel else epilogue),
        slots,
        tile_experts,
        num_rows,
        num_outputs,
        launch.problem.in_features,
        num_groups,
        weight.codes.stride(-2),
        product.rows.stride(0),
        row_stride,
        launch.blocks_per_segment,
        SUM=product.sum_blocks,
        **matmul_constants(launch, routing.rows_per_token if routing else 1),
        num_warps=launch.tile.num_warps,
        num_stages=launch.tile.num_stages,
        enable_fp_fusion=True,
    )
    if launch.parallel:
        _add_segments(target, out, epilogue, routing)


def _add_segments(
    partial: torch.Tensor,
    out: torch.Tensor,
    epilogue: tuple[torch.Tensor | None, ...],
    routing: Routing | None,
) -> None:
    """Writes the sum of the segments ``partial [num_segments, num_rows, N]`` to ``out``.

    epilogue: scales of the rows, scales of the outputs, bias.
    """
    num_segments, num_rows, num_outputs = partial.shape
    reduce_kernel[(triton.cdiv(num_outputs, REDUCE_BLOCK), num_rows)](
        partial,
        out,
        *epilogue,
        routing.row_experts if routing else None,
        num_outputs,
        num_rows * num_outputs,
        out.stride(0),
        NUM_SEGMENTS=num_segments,
        BLOCK=REDUCE_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
def matmul_kernel(
    x_ptr, code_ptr, parameter_ptr, out_ptr, row_scale_ptr, channel_ptr, bias_ptr,
    slot_ptr, expert_ptr,
    num_rows, num_outputs, num_inputs, num_groups, code_stride, x_stride, out_stride,
    blocks_per_segment,
    SUM: tl.constexpr, FORMAT: tl.constexpr, ROWS_PER_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """A tile of ``x @ weight.T``, summed over SEGMENTS segments from number ``program_id(2)`` on.

    out_ptr: ``[num_rows, num_outputs]``, one after the other for each value of ``program_id(2)``.
    SUM: the tile code, FORMAT: what it has to know. Pointers that may be None: parameters, scales,
    bias, and the slots and experts of ``Routing``.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    segment = tl.program_id(2)
    expert = 0
    if slot_ptr is not None:
        rows = tl.load(slot_ptr + rows)
        expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
        code_ptr += expert * num_outputs * code_stride
        if parameter_ptr is not None:
            parameter_ptr += expert * num_groups * num_outputs
    # Past the edge the last row and output are read again: cheaper than masks in the loop.
    near_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    near_outputs = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    x_ptrs = x_ptr + (near_rows // ROWS_PER_TOKEN)[:, None] * x_stride
    code_ptrs = code_ptr + near_outputs[:, None] * code_stride
    num_blocks = tl.cdiv(num_inputs, 128)
    if slot_ptr is not None:
        num_blocks = tl.where(tl.min(rows) < num_rows, num_blocks, 0)  # nothing for an empty tile

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(SEGMENTS):
        first = (segment + step) * blocks_per_segment
        last = tl.minimum(first + blocks_per_segment, num_blocks)
        total += SUM(
            x_ptrs, code_ptrs, parameter_ptr, near_outputs, num_inputs, num_outputs, first, last,
            FORMAT, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    total = apply_epilogue(
        total, row_scale_ptr, near_rows[None, :], channel_ptr, bias_ptr,
        (expert * num_outputs + near_outputs)[:, None],
    )  # fmt: skip
    out_ptr += segment.to(tl.int64) * num_rows * num_outputs
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * out_stride + outputs[:, None]
    mask = (rows < num_rows)[None, :] & (outputs < num_outputs)[:, None]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduce_kernel(
    partial_ptr, out_ptr, row_scale_ptr, channel_ptr, bias_ptr, expert_ptr,
    num_outputs, segment_stride, out_stride,
    NUM_SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[row, :]`` as the partial sums of the segments, added from the first to the last.

    expert_ptr: the expert of each row, or None.
    """
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = outputs < num_outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for segment in tl.static_range(NUM_SEGMENTS):
        offset = tl.cast(segment, tl.int64) * segment_stride + row * num_outputs
        total += tl.load(partial_ptr + offset + outputs, mask=mask, other=0.0)
    near = tl.minimum(outputs, num_outputs - 1)
    if expert_ptr is not None:
        near += tl.load(expert_ptr + row).to(tl.int64) * num_outputs
    out = apply_epilogue(total, row_scale_ptr, row, channel_ptr, bias_ptr, near)
    tl.store(out_ptr + row * out_stride + outputs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_inputs(x_ptrs, k, num_inputs, EVEN: tl.constexpr):
    """Inputs of the rows at ``x_ptrs``; zeros where their numbers ``k`` are past the last.

    That is asked for only unless EVEN. One number stands for a load that has all inputs, or none.
    """
    if EVEN:
        return tl.load(x_ptrs)
    return tl.load(x_ptrs, mask=k < num_inputs, other=0.0)


@triton.jit
def half_scales(parameters, BFLOAT16: tl.constexpr):
    """The float32 scales ``[BLOCK_N, 1]`` in the lower halves of packed parameters."""
    if BFLOAT16:
        scales = (parameters << 16).to(tl.float32, bitcast=True)
    else:
        scales = parameters.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scales[:, None]


@triton.jit
def apply_epilogue(total, row_scale_ptr, rows, channel_ptr, bias_ptr, outputs):
    """``total`` with the scales and the bias that are there; rows and outputs: where theirs are.

    What is fused is said, so that both kernels round alike.
    """
    factor = tl.zeros_like(total) + 1.0
    if row_scale_ptr is not None:
        factor *= tl.load(row_scale_ptr + rows)
    if channel_ptr is not None:
        factor *= tl.load(channel_ptr + outputs)
    if bias_ptr is not None:
        return tl.fma(total, factor, tl.zeros_like(total) + tl.load(bias_ptr + outputs))
    return total * factor
