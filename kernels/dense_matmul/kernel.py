"""The matmul with float weights in Triton, for NVIDIA and AMD: ``out = x @ weight.T``."""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.activations import Activations
from qserve.kernels.dense_matmul.launch import STEP, dense_launch
from qserve.kernels.gpu_target import gpu_target
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.tiled_matmul.kernel import (
    TiledProduct,
    TiledWeight,
    check_half,
    load_inputs,
    pack_tiles,
)
from qserve.kernels.tiled_matmul.launch import BLOCK, MatmulProblem

_STEP = tl.constexpr(STEP)


def prepare(
    weight: torch.Tensor, device: torch.device, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight [N, K]`` on ``device`` in its own dtype, its rows padded to whole blocks."""
    product = DenseProduct(weight, device, bias)
    return pack_tiles(product, product.weight, product.arrange)


class DenseProduct:
    """Products with a float weight, with rows of 16 bits."""

    __slots__ = ("in_features", "out_features", "weight")

    def __init__(
        self, weight: torch.Tensor, device: torch.device, bias: torch.Tensor | None = None
    ) -> None:
        self.out_features, self.in_features = weight.shape
        kept = weight.to(device).contiguous()
        if missing := -self.in_features % BLOCK:
            kept = torch.nn.functional.pad(kept, (0, missing))
        self.weight = TiledWeight(kept, bias=bias).to(device)

    def arrange(self, x: torch.Tensor, _: Activations) -> TiledProduct:
        """The product with float16 or bfloat16 rows ``x``, read as they are. Raises ``TypeError``
        for rows of another dtype."""
        check_half(x)
        problem = MatmulProblem(x.shape[0], self.out_features, self.in_features, 0, x.dtype)
        return TiledProduct(x, self.weight, dense_launch(problem, gpu_target(x.device)), sum_blocks)


@triton.jit
def sum_blocks(
    x_ptrs, code_ptrs, parameter_ptr, outputs, num_inputs, num_outputs, first, last,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile summed over blocks ``first`` to ``last - 1``: float32 ``[BLOCK_N, BLOCK_M]``.

    x_ptrs, code_ptrs: the first element of each row, ``[BLOCK_M, 1]`` and ``[BLOCK_N, 1]``. Rows
    and weights of two dtypes are multiplied in float32, which holds both.
    """
    inputs = tl.arange(0, _STEP)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        for step in tl.static_range(128 // _STEP):
            k = block * 128 + step * _STEP
            weights = tl.load(code_ptrs + k + inputs)
            x = load_inputs(x_ptrs + k + inputs, k + inputs, num_inputs, FORMAT.even)
            if weights.dtype == x.dtype:
                total = tl.dot(weights, tl.trans(x), total)
            else:
                wide = tl.trans(x.to(tl.float32))
                total = tl.dot(weights.to(tl.float32), wide, total, input_precision="ieee")
    return total
