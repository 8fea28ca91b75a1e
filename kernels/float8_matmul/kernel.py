"""The float8 matmul in Triton, for NVIDIA and AMD: ``out = x @ dequantize(weight).T``."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.activations import Activations
from qserve.kernels.float8_matmul.launch import float8_dtype, float8_launch
from qserve.kernels.float8_matmul.layout import pack_float8
from qserve.kernels.float8_matmul.unpack_ptx import unpack_constraints, unpack_ptx
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.gpu_target import GpuTarget, gpu_target
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.quantize_tokens.kernel import quantize_tokens, round_tokens
from qserve.kernels.tiled_matmul.kernel import (
    TiledProduct,
    TiledWeight,
    check_half,
    load_inputs,
    pack_tiles,
)
from qserve.kernels.tiled_matmul.launch import MatmulProblem

_ptx = triton.constexpr_function(unpack_ptx)
_constraints = triton.constexpr_function(unpack_constraints)


def prepare(
    weight: Float8Weight, device: torch.device, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight`` on ``device`` as its tiles read it. Raises what ``pack_float8`` raises."""
    product = Float8Product(weight, device, gpu_target(device), bias)
    return pack_tiles(weight, product.weight, product.arrange)


class Float8Product:
    """Products with a weight of 8-bit floats, with rows of 16 bits or of float8."""

    __slots__ = ("_shape", "_target", "weight")

    def __init__(
        self,
        weight: Float8Weight,
        device: torch.device,
        target: GpuTarget,
        bias: torch.Tensor | None = None,
    ) -> None:
        packed = pack_float8(weight, float8_dtype(target))
        self._target = target
        self.weight = TiledWeight(packed.values, packed.parameters, packed.channel_scales, bias).to(
            device
        )
        self._shape = (weight.out_features, weight.in_features, packed.group_size)

    def arrange(self, x: torch.Tensor, activations: Activations) -> TiledProduct:
        """The product with float16 or bfloat16 rows ``x``.

        Rows are read as they are unless ``activations`` rounds each with one scale; where the
        target has no float8, rounded rows are multiplied as 16-bit floats. Raises ``TypeError`` for
        rows of another dtype.
        """
        check_half(x)
        dtype = self.weight.codes.dtype
        scales: torch.Tensor | None
        if activations is Activations.FLOAT8_TOKEN and dtype is not torch.int8:
            rows, scales = quantize_tokens(x, activations, dtype)
        else:
            rows, scales = round_tokens(x, activations)
        launch = float8_launch(MatmulProblem(x.shape[0], *self._shape, rows.dtype), self._target)
        return TiledProduct(rows, self.weight, launch, sum_blocks, scales)


@triton.jit
def sum_blocks(
    x_ptrs, code_ptrs, parameter_ptr, outputs, num_inputs, num_outputs, first, last,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile summed over blocks ``first`` to ``last - 1``: float32 ``[BLOCK_N, BLOCK_M]``.

    x_ptrs, code_ptrs: the first element of each row, ``[BLOCK_M, 1]`` and ``[BLOCK_N, 1]``.
    """
    GROUP: tl.constexpr = FORMAT.group_size
    STEP: tl.constexpr = FORMAT.step
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    inputs = tl.arange(0, STEP)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        for step in tl.static_range(128 // STEP):
            k = block * 128 + step * STEP
            weights = _unpack(tl.load(code_ptrs + k + inputs), dtype, FORMAT)
            x = load_inputs(x_ptrs + k + inputs, k + inputs, num_inputs, FORMAT.even)
            if GROUP:
                scales = tl.load(parameter_ptr + outputs + k // GROUP * num_outputs)
                total += tl.dot(weights, tl.trans(x), zero) * scales[:, None]
            else:
                # sm_90 adds float8 products with 14 bits: for no more than 128 inputs in a row.
                total = tl.dot(weights, tl.trans(x), total, max_num_imprecise_acc=128)
    return total


@triton.jit
def _unpack(values, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """``values`` in ``dtype``, exactly."""
    if FORMAT.assembly and dtype == tl.bfloat16:
        weights = tl.inline_asm_elementwise(
            _ptx(True), _constraints(), [values], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif FORMAT.assembly:
        weights = tl.inline_asm_elementwise(
            _ptx(False), _constraints(), [values], dtype=tl.float16, is_pure=True, pack=4
        )
    elif FORMAT.as_bits:
        # The bits of an e4m3 in the place of a float32's are the value over 2^120.
        bits = values.to(tl.int32)
        magnitudes = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        signs = (bits & 0x80) << 24
        weights = (magnitudes.to(tl.int32, bitcast=True) | signs).to(tl.float32, bitcast=True)
        weights = weights.to(dtype)
    else:
        weights = values.to(dtype)
    return weights
