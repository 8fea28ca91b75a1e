"""The int8 matmul in Triton, for NVIDIA and AMD: ``out = x @ dequantize(weight).T``."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.activations import Activations
from qserve.kernels.gpu_target import gpu_target
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int8_matmul.launch import int8_launch
from qserve.kernels.int8_matmul.layout import pack_int8
from qserve.kernels.int8_matmul.unpack_ptx import unpack_constraints, unpack_ptx
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
from qserve.kernels.tiled_matmul.launch import MatmulProblem

_ptx = triton.constexpr_function(unpack_ptx)
_constraints = triton.constexpr_function(unpack_constraints)


def prepare(
    weight: GroupedWeight, device: torch.device, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight`` on ``device`` as the tiles read it. Raises what ``pack_int8`` raises."""
    product = Int8Product(weight, device, bias)
    return pack_tiles(weight, product.weight, product.arrange)


class Int8Product:
    """Products with an 8-bit weight: float32 sums with 16-bit rows, int32 sums with int8 rows."""

    __slots__ = ("_asymmetric", "_input_order", "_scale_dtype", "_shape", "weight")

    def __init__(
        self, weight: GroupedWeight, device: torch.device, bias: torch.Tensor | None = None
    ) -> None:
        packed = pack_int8(weight)
        self.weight = TiledWeight(packed.codes, packed.parameters, packed.channel_scales, bias).to(
            device
        )
        order = weight.input_order
        self._input_order = None if order is None else order.to(device)
        self._asymmetric = packed.asymmetric
        self._scale_dtype = packed.scale_dtype
        self._shape = (weight.out_features, weight.in_features, packed.group_size)

    def arrange(self, x: torch.Tensor, activations: Activations) -> TiledProduct:
        """The product with float16 or bfloat16 rows ``x``.

        Rows are read as they are unless ``activations`` rounds each with one scale. Codes less a
        zero point do not fit int8: with those, rounded rows are multiplied as 16-bit floats. Raises
        ``TypeError`` for rows of another dtype.
        """
        check_half(x)
        if self._input_order is not None:
            x = x.index_select(1, self._input_order)
        scales: torch.Tensor | None
        if activations is Activations.INT8_TOKEN and not self._asymmetric:
            rows, scales = quantize_tokens(x, activations, torch.int8)
        else:
            rows, scales = round_tokens(x, activations)
        launch = int8_launch(
            MatmulProblem(x.shape[0], *self._shape, rows.dtype),
            gpu_target(x.device),
            asymmetric=self._asymmetric,
            scale_dtype=self._scale_dtype,
        )
        return TiledProduct(rows, self.weight, launch, sum_blocks, scales)


@triton.jit
def sum_blocks(
    x_ptrs, code_ptrs, parameter_ptr, outputs, num_inputs, num_outputs, first, last,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile summed over blocks ``first`` to ``last - 1``: float32 ``[BLOCK_N, BLOCK_M]``.

    x_ptrs, code_ptrs: the first element of each row, ``[BLOCK_M, 1]`` and ``[BLOCK_N, 1]``. Sums
    are int32 for rows of int8.
    """
    GROUP: tl.constexpr = FORMAT.group_size
    STEP: tl.constexpr = FORMAT.step
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    inputs = tl.arange(0, STEP)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if dtype == tl.int8:
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        for step in tl.static_range(128 // STEP):
            k = block * 128 + step * STEP
            codes = tl.load(code_ptrs + k + inputs)
            x = load_inputs(x_ptrs + k + inputs, k + inputs, num_inputs, FORMAT.even)
            if GROUP:
                parameters = tl.load(parameter_ptr + outputs + k // GROUP * num_outputs)
                weights = _unpack(codes, parameters, dtype, FORMAT)
                product = tl.dot(weights, tl.trans(x), part)
                total += product.to(tl.float32) * half_scales(parameters, FORMAT.bfloat16_scales)
            else:
                part = tl.dot(_unpack(codes, 0, dtype, FORMAT), tl.trans(x), part)
    if not GROUP:
        total = part.to(tl.float32)
    return total


@triton.jit
def _unpack(codes, parameters, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """``codes`` less their zero points, exact in ``dtype``; as they are for int8."""
    if FORMAT.asymmetric:
        # The upper half of a parameter is the zero point as a bfloat16.
        zeros = (parameters & -65536).to(tl.float32, bitcast=True)[:, None]
    if dtype == tl.int8:
        weights = codes
    elif not FORMAT.assembly and FORMAT.asymmetric:
        weights = (codes.to(tl.float32) - zeros).to(dtype)
    elif not FORMAT.assembly:
        weights = codes.to(dtype)
    elif FORMAT.asymmetric and dtype == tl.bfloat16:
        weights = tl.inline_asm_elementwise(
            _ptx(True, True), _constraints(True), [codes, (-zeros).to(tl.bfloat16)],
            dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    elif FORMAT.asymmetric:
        weights = tl.inline_asm_elementwise(
            _ptx(False, True), _constraints(True), [codes, (-1152.0 - zeros).to(tl.float16)],
            dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    elif dtype == tl.bfloat16:
        weights = tl.inline_asm_elementwise(
            _ptx(True, False), _constraints(False), [codes],
            dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        weights = tl.inline_asm_elementwise(
            _ptx(False, False), _constraints(False), [codes],
            dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    return weights
