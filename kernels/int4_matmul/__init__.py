"""Activations times a grouped weight of 4 bits or fewer."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul import cpu, reference
from qserve.kernels.int4_matmul.planar4 import PLANE
from qserve.kernels.packed_weight import PackedWeight, check_bias, from_native, multiply
from qserve.kernels.panels import suits_panels

__all__ = ["Activations", "int4_matmul", "prepare"]

CPU = torch.device("cpu")


def prepare(
    weight: GroupedWeight, device: torch.device = CPU, *, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight`` repacked once for fast products on ``device``; ``weight`` itself is no longer
    needed.

    Codes of 2, 3 and 4 bits are taken. A group size that is neither a multiple of 32 nor the whole
    row runs on the reference. bias: ``[N]``, added to every row of a product. Raises ``ValueError``
    for other widths and for a bias of another shape.
    """
    if weight.bits not in (2, 3, 4):
        raise ValueError(f"the weight has {weight.bits} bits, expected 2, 3 or 4")
    check_bias(bias, weight.out_features)
    backend = choose("int4_matmul", device).backend
    if backend is Backend.CPU and suits_panels(weight.group_size, weight.in_features):
        return from_native(cpu.pack(weight, bias))
    if backend is Backend.TRITON and weight.group_size % PLANE == 0:
        packed: PackedWeight = load_kernel("int4_matmul").prepare(weight, device, bias)
        return packed
    return reference.prepare(weight, device, bias)


def int4_matmul(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    out: torch.Tensor | None = None,
    activations: Activations = Activations.INT8,
) -> torch.Tensor:
    """``y[m, n] = sum_k a[m, k] * (codes[n, k] - zero_points[n, k // G]) * scales[n, k // G]``

    ``a`` is what ``activations`` makes of ``x``, its columns in the order of the codes: see
    ``activations.round_activations``. Outer scales and the bias, if any, follow. On a GPU
    ``a`` is ``x`` for INT8 too: tensor cores make nothing of groups of 32. Shapes, strides and
    errors: see ``packed_weight.multiply``.
    """
    return multiply(x, weight, out=out, activations=activations)
