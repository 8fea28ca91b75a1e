"""Activations times a weight of 8-bit floats."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.float8_matmul import cpu, reference
from qserve.kernels.float8_matmul.layout import suits_tiles
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.packed_weight import PackedWeight, check_bias, from_native, multiply

__all__ = ["Activations", "float8_matmul", "prepare"]

CPU = torch.device("cpu")


def prepare(
    weight: Float8Weight, device: torch.device = CPU, *, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight`` repacked once for fast products on ``device``; ``weight`` itself is no longer
    needed.

    Blocks of inputs that are no multiple of 32, and weights with a NaN, run on the reference. bias:
    ``[N]``, added to every row of a product. Raises ``ValueError`` for a bias of another
    shape.
    """
    check_bias(bias, weight.out_features)
    backend = choose("float8_matmul", device).backend
    if backend is Backend.CPU and cpu.suits(weight):
        return from_native(cpu.pack(weight, bias))
    if backend is Backend.TRITON and suits_tiles(weight):
        packed: PackedWeight = load_kernel("float8_matmul").prepare(weight, device, bias)
        return packed
    return reference.prepare(weight, device, bias)


def float8_matmul(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    out: torch.Tensor | None = None,
    activations: Activations = Activations.FLOAT32,
) -> torch.Tensor:
    """``y[m, n] = sum_k a[m, k] * values[n, k] * scales[n // rows, k // columns] + bias[n]``

    ``a`` is what ``activations`` makes of ``x``: see ``activations.round_activations``. Shapes,
    strides and errors: see ``packed_weight.multiply``.
    """
    return multiply(x, weight, out=out, activations=activations)
