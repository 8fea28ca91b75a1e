"""The int4 matmul in Triton, for NVIDIA and AMD: ``out = x @ dequantize(weight).T``."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from qserve.kernels.activations import Activations
from qserve.kernels.gpu_target import gpu_target
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul.launch import int4_byte_launch, int4_launch
from qserve.kernels.int4_matmul.planar4 import is_progressive, pack_planar4
from qserve.kernels.int4_matmul.unpack_ptx import (
    BF16_BIAS,
    FP16_HIGH_BIAS,
    FP16_LOW_BIAS,
    byte_constraints,
    byte_ptx,
    unpack_constraints,
    unpack_ptx,
)
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.quantize_tokens.kernel import quantize_tokens, round_tokens
from qserve.kernels.tiled_matmul.kernel import (
    TiledProduct,
    TiledWeight,
    check_half,
    half_scales,
    load_inputs,
    pack_tiles,
)
from qserve.kernels.tiled_matmul.launch import BLOCK, MatmulProblem

_ptx = triton.constexpr_function(unpack_ptx)
_constraints = triton.constexpr_function(unpack_constraints)
_byte_ptx = triton.constexpr_function(byte_ptx)
_byte_constraints = triton.constexpr_function(byte_constraints)
_FP16_LOW_BIAS = tl.constexpr(FP16_LOW_BIAS)
_FP16_HIGH_BIAS = tl.constexpr(FP16_HIGH_BIAS)
_BF16_BIAS = tl.constexpr(BF16_BIAS)


def prepare(
    weight: GroupedWeight, device: torch.device, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight`` in planar4 on ``device``. Raises what ``pack_planar4`` raises."""
    product = Int4Product(weight, device, bias)
    return pack_tiles(weight, product.weight, product.arrange)


class Int4Product:
    """Products with a 4-bit weight: float32 sums with 16-bit rows, int32 sums with int8 rows."""

    __slots__ = ("_byte_weight", "_input_order", "_progressive", "_scale_dtype", "_shape", "weight")

    def __init__(
        self, weight: GroupedWeight, device: torch.device, bias: torch.Tensor | None = None
    ) -> None:
        packed = pack_planar4(weight)
        self.weight = TiledWeight(packed.words, packed.parameters, weight.channel_scales, bias).to(
            device
        )
        self._byte_weight = replace(self.weight, codes=self.weight.codes.view(torch.int8))
        order = weight.input_order
        self._input_order = None if order is None else order.to(device)
        self._progressive = is_progressive(weight)
        self._scale_dtype = packed.scale_dtype
        self._shape = (weight.out_features, weight.in_features, packed.group_size)

    def arrange(self, x: torch.Tensor, activations: Activations) -> TiledProduct:
        """The product with float16 or bfloat16 rows ``x``.

        Rows are read as they are unless ``activations`` rounds each with one scale: of groups of 32
        a tensor core makes nothing, and 16-bit rows cost it no more. Raises ``TypeError`` for rows
        of another dtype.
        """
        check_half(x)
        if self._input_order is not None:
            x = x.index_select(1, self._input_order)
        target = gpu_target(x.device)
        scales: torch.Tensor | None
        if activations is Activations.INT8_TOKEN and self._shape[2] % BLOCK == 0:
            codes, scales = quantize_tokens(x, activations, torch.int8, planar=True)
            problem = MatmulProblem(x.shape[0], *self._shape, torch.int8)
            launch = int4_byte_launch(problem, target, self._scale_dtype, self._progressive)
            return TiledProduct(codes, self._byte_weight, launch, sum_byte_blocks, scales)
        rows, scales = round_tokens(x, activations)
        problem = MatmulProblem(x.shape[0], *self._shape, x.dtype)
        launch = int4_launch(problem, target, self._scale_dtype)
        return TiledProduct(rows, self.weight, launch, sum_blocks, scales)


@triton.jit
def sum_blocks(
    x_ptrs, code_ptrs, parameter_ptr, outputs, num_inputs, num_outputs, first, last,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile summed over blocks ``first`` to ``last - 1``: float32 ``[BLOCK_N, BLOCK_M]``.

    x_ptrs, code_ptrs: the first element of each row, ``[BLOCK_M, 1]`` and ``[BLOCK_N, 1]``.
    """
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    GROUP: tl.constexpr = FORMAT.group_size
    WIDE: tl.constexpr = FORMAT.bfloat16_scales
    plane = tl.arange(0, 32)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        words = tl.load(code_ptrs + block * 32 + plane)
        for half in tl.static_range(2):
            k = block * 128 + half * 64
            if half == 0 or GROUP < 128:
                low_ptrs = parameter_ptr + outputs + k // GROUP * num_outputs
                low_parameters = tl.load(low_ptrs)
                high_parameters = low_parameters
            if GROUP == 32:
                high_parameters = tl.load(low_ptrs + num_outputs)
            low, high = _unpack(words, low_parameters, high_parameters, 2 * half, dtype, FORMAT)
            low_x = load_inputs(x_ptrs + plane + k, k, num_inputs, FORMAT.even)
            high_x = load_inputs(x_ptrs + plane + k + 32, k + 32, num_inputs, FORMAT.even)
            if FORMAT.hoist:
                if half == 0 or GROUP < 128:
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                part = tl.dot(low, tl.trans(low_x), part)
                if GROUP == 32:
                    total += part * half_scales(low_parameters, WIDE)
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                part = tl.dot(high, tl.trans(high_x), part)
                if half == 1 or GROUP < 128:
                    total += part * half_scales(high_parameters, WIDE)
            else:
                total = tl.dot(low, tl.trans(low_x), total)
                total = tl.dot(high, tl.trans(high_x), total)
    return total


@triton.jit
def sum_byte_blocks(
    x_ptrs, code_ptrs, parameter_ptr, outputs, num_inputs, num_outputs, first, last,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As ``sum_blocks``, for rows of int8 in the order of the nibbles: ``quantize_tokens``.

    code_ptrs: planar4 as bytes, 64 to a block, each with the codes of two inputs.
    """
    half_block = tl.arange(0, 64)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for block in range(first, last):
        pairs = tl.load(code_ptrs + block * 64 + half_block)
        group = block * 128 // FORMAT.group_size
        parameters = tl.load(parameter_ptr + outputs + group * num_outputs)
        scales = half_scales(parameters, FORMAT.bfloat16_scales)
        low, high = _unpack_bytes(pairs, parameters, scales, FORMAT)
        low_x = tl.load(x_ptrs + block * 128 + half_block)
        high_x = tl.load(x_ptrs + block * 128 + 64 + half_block)
        part = tl.dot(low, tl.trans(low_x), part)
        part = tl.dot(high, tl.trans(high_x), part)
        if not FORMAT.progressive:
            total += part.to(tl.float32) * scales
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    if FORMAT.progressive:
        total = part.to(tl.float32)
    return total


@triton.jit
def _biases(zero_points, BITS: tl.constexpr, dtype: tl.constexpr):
    """Floats whose bits are ``BITS | zero_points``: ``[BLOCK_N, 1]``."""
    return (zero_points | BITS).to(tl.int16).to(dtype, bitcast=True)[:, None]


@triton.jit
def _less_zero(containers, zero_points, dtype: tl.constexpr):
    """The lowest code of ``containers`` less its zero point, exact in ``dtype``."""
    codes = containers & 15
    if dtype == tl.bfloat16:
        # Hardware without bfloat16 arithmetic would round every result in five instructions; small
        # integers need no rounding, the upper half of the float32 is the number.
        values = codes.to(tl.float32) - zero_points.to(tl.float32)[:, None]
        return (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(dtype, bitcast=True)
    return codes.to(dtype) - zero_points.to(dtype)[:, None]


@triton.jit
def _unpack(
    words, low_parameters, high_parameters, FIRST_PLANE: tl.constexpr, dtype: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Planes FIRST_PLANE and the next of ``words``, less their zero points: ``[BLOCK_N, 32]`` each.

    They are scaled too unless hoisted. Arithmetic is in ``dtype``; without the scale it is exact.
    """
    low_zeros = low_parameters >> 16
    high_zeros = high_parameters >> 16
    low_scales = half_scales(low_parameters, FORMAT.bfloat16_scales).to(dtype)
    high_scales = half_scales(high_parameters, FORMAT.bfloat16_scales).to(dtype)
    if FORMAT.assembly and dtype == tl.bfloat16:
        low_biases = _biases(low_zeros, _BF16_BIAS, dtype)
        high_biases = _biases(high_zeros, _BF16_BIAS, dtype)
        low, high = tl.inline_asm_elementwise(
            _ptx(FIRST_PLANE, True, False), _constraints(False),
            [words, low_biases, high_biases],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif FORMAT.assembly:
        low_biases = _biases(low_zeros, _FP16_LOW_BIAS, dtype)
        high_biases = _biases(high_zeros << 4, _FP16_HIGH_BIAS, dtype)
        if FORMAT.hoist:
            low, high = tl.inline_asm_elementwise(
                _ptx(FIRST_PLANE, False, False), _constraints(False),
                [words, low_biases, high_biases],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                _ptx(FIRST_PLANE, False, True), _constraints(True),
                [words, low_biases, high_biases, low_scales, high_scales],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
    else:
        low = _less_zero(words >> (4 * FIRST_PLANE), low_zeros, dtype)
        high = _less_zero(words >> (4 * FIRST_PLANE + 4), high_zeros, dtype)
    if not FORMAT.hoist and not (FORMAT.assembly and dtype == tl.float16):
        low *= low_scales
        high *= high_scales
    return low, high


@triton.jit
def _unpack_bytes(pairs, parameters, scales, FORMAT: tl.constexpr):
    """The lower and upper codes of ``pairs`` less their zero points: int8 ``[BLOCK_N, 64]`` each.

    Progressive codes are multiplied by their scales, integers that keep the product in int8.
    """
    zeros = (parameters >> 16)[:, None]
    factors = scales.to(tl.int32)
    if FORMAT.progressive:
        zeros *= factors
    zeros, factors = zeros.to(tl.int8), factors.to(tl.int8)
    if FORMAT.progressive and FORMAT.assembly:
        low, high = tl.inline_asm_elementwise(
            _byte_ptx(True), _byte_constraints(True), [pairs, zeros, factors],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    elif FORMAT.assembly:
        low, high = tl.inline_asm_elementwise(
            _byte_ptx(False), _byte_constraints(False), [pairs, zeros],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    elif FORMAT.progressive:
        low, high = (pairs & 15) * factors - zeros, (pairs >> 4 & 15) * factors - zeros
    else:
        low, high = (pairs & 15) - zeros, (pairs >> 4 & 15) - zeros
    return low, high
