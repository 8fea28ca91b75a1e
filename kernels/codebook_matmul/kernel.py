"""The codebook matmul in Triton, for NVIDIA and AMD: ``out = x @ dequantize(weight).T``."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.activations import Activations
from qserve.kernels.codebook_matmul.launch import codebook_launch
from qserve.kernels.codebook_matmul.layout import pack_codebook
from qserve.kernels.codebook_matmul.lookup_ptx import lookup_constraints, lookup_ptx
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.gpu_target import gpu_target
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.quantize_tokens.kernel import round_tokens
from qserve.kernels.tiled_matmul.kernel import (
    TiledProduct,
    TiledWeight,
    check_half,
    load_inputs,
    pack_tiles,
)
from qserve.kernels.tiled_matmul.launch import MatmulProblem

_ptx = triton.constexpr_function(lookup_ptx)
_constraints = triton.constexpr_function(lookup_constraints)


def prepare(
    weight: CodebookWeight, device: torch.device, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight`` on ``device`` as its tiles read it. Raises what ``pack_codebook`` raises."""
    product = CodebookProduct(weight, device, bias)
    return pack_tiles(weight, product.weight, product.arrange)


class CodebookProduct:
    """Products with a codebook weight, with rows of 16 bits."""

    __slots__ = ("_codebook", "_shape", "weight")

    def __init__(
        self, weight: CodebookWeight, device: torch.device, bias: torch.Tensor | None = None
    ) -> None:
        packed = pack_codebook(weight)
        self.weight = TiledWeight(packed.words, packed.parameters, None, bias).to(device)
        self._codebook = packed.codebook
        self._shape = (weight.out_features, weight.in_features, packed.group_size)

    def arrange(self, x: torch.Tensor, activations: Activations) -> TiledProduct:
        """The product with float16 or bfloat16 rows ``x``.

        Values of the codebook are rounded to the dtype of ``x``. Raises ``TypeError`` for rows of
        another dtype.
        """
        check_half(x)
        rows, scales = round_tokens(x, activations)
        problem = MatmulProblem(x.shape[0], *self._shape, x.dtype)
        launch = codebook_launch(problem, gpu_target(x.device), self._codebook)
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
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    plane = tl.arange(0, 32)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        planes = _look_up(tl.load(code_ptrs + block * 32 + plane), dtype, FORMAT)
        for index in tl.static_range(4):
            k = block * 128 + index * 32
            if index * 32 % GROUP == 0:
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            x = load_inputs(x_ptrs + plane + k, k, num_inputs, FORMAT.even)
            part = tl.dot(planes[index], tl.trans(x), part)
            if (index + 1) * 32 % GROUP == 0:
                scales = tl.load(parameter_ptr + outputs + k // GROUP * num_outputs)
                total += part * scales[:, None]
    return total


@triton.jit
def _look_up(words, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """The values of the four planes of ``words``: ``[BLOCK_N, 32]`` each."""
    if FORMAT.assembly and dtype == tl.bfloat16:
        planes = tl.inline_asm_elementwise(
            _ptx(FORMAT.table), _constraints(), [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif FORMAT.assembly:
        planes = tl.inline_asm_elementwise(
            _ptx(FORMAT.table), _constraints(), [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        planes = (
            _select(words & 15, dtype, FORMAT),
            _select(words >> 4 & 15, dtype, FORMAT),
            _select(words >> 8 & 15, dtype, FORMAT),
            _select(words >> 12 & 15, dtype, FORMAT),
        )
    return planes


@triton.jit
def _select(codes, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """The values of ``codes``: a choice between two for each bit, the lowest first."""
    first = _select_quarter(codes, FORMAT.codebook, 0)
    second = _select_quarter(codes, FORMAT.codebook, 4)
    third = _select_quarter(codes, FORMAT.codebook, 8)
    last = _select_quarter(codes, FORMAT.codebook, 12)
    lower = tl.where((codes & 4) != 0, second, first)
    upper = tl.where((codes & 4) != 0, last, third)
    return tl.where((codes & 8) != 0, upper, lower).to(dtype)


@triton.jit
def _select_quarter(codes, TABLE: tl.constexpr, FIRST: tl.constexpr):
    """The value of TABLE that is FIRST plus the lower two bits of ``codes``."""
    is_odd = (codes & 1) != 0
    lower = tl.where(is_odd, TABLE[FIRST + 1], TABLE[FIRST])
    upper = tl.where(is_odd, TABLE[FIRST + 3], TABLE[FIRST + 2])
    return tl.where((codes & 2) != 0, upper, lower)
