"""The gated activations in Triton."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.gated_activation.gate import Gate
from qserve.kernels.gated_activation.launch import BLOCK, NUM_WARPS, gate_grid


def gated_activation(gate_up: torch.Tensor, activation: Gate, out: torch.Tensor) -> None:
    """Writes the activation of the first half of each row times its second half to ``out``."""
    num_rows, width = out.shape
    if not num_rows:
        return
    gate_kernel[gate_grid(num_rows, width)](
        gate_up,
        out,
        width,
        gate_up.stride(0),
        out.stride(0),
        GATE=activation.value,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


@triton.jit
def gate_kernel(
    gate_up_ptr, out_ptr, width, in_stride, out_stride, GATE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK columns of one row. GATE: the value of a ``Gate``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate_ptrs = gate_up_ptr + row * in_stride + columns
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask=mask, other=0.0).to(tl.float32)
    # Both gates that close by an exponential are 0 in float32 long before its exponent is 80.
    if GATE == "silu":
        opened = gate / (1.0 + tl.exp(tl.minimum(-gate, 80.0)))
    elif GATE == "gelu":
        opened = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # x * (1 + tanh(z)) / 2 is x / (1 + exp(-2 z)).
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        opened = gate / (1.0 + tl.exp(tl.minimum(-2.0 * z, 80.0)))
    y = (opened * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + columns, y, mask=mask)
