"""Activations times a weight of 4-bit codes into a table of floats (nf4, fp4)."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.codebook_matmul import cpu, reference
from qserve.kernels.codebook_matmul.layout import suits_tiles
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.packed_weight import PackedWeight, check_bias, from_native, multiply

__all__ = ["Activations", "codebook_matmul", "prepare"]

CPU = torch.device("cpu")


def prepare(
    weight: CodebookWeight, device: torch.device = CPU, *, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight`` repacked once for fast products on ``device``; ``weight`` itself is no longer
    needed.

    Blocks that cross from a row to the next run on the reference. bias: ``[N]``, added to every row
    of a product. Raises ``ValueError`` for a bias of another
    shape.
    """
    check_bias(bias, weight.out_features)
    backend = choose("codebook_matmul", device).backend
    if backend is Backend.CPU and cpu.suits(weight):
        return from_native(cpu.pack(weight, bias))
    if backend is Backend.TRITON and suits_tiles(weight):
        packed: PackedWeight = load_kernel("codebook_matmul").prepare(weight, device, bias)
        return packed
    return reference.prepare(weight, device, bias)


def codebook_matmul(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    out: torch.Tensor | None = None,
    activations: Activations = Activations.INT8,
) -> torch.Tensor:
    """``y[m, n] = sum_k a[m, k] * table[codes[n, k]] * block_scales[...] + bias[n]``

    ``a`` is what ``activations`` makes of ``x``: see ``activations.round_activations``. ``table``
    is the codebook, or under int8 activations the codebook rounded to int8: see
    ``reference.round_codebook``. On a GPU it is the codebook in the dtype of ``x``.
    Shapes, strides and errors: see ``packed_weight.multiply``.
    """
    return multiply(x, weight, out=out, activations=activations)
