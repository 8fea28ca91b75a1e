"""Activations times a weight that is not quantized."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.dense_matmul import cpu, reference
from qserve.kernels.packed_weight import PackedWeight, check_bias, from_native, multiply

__all__ = ["dense_matmul", "prepare"]

CPU = torch.device("cpu")
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def prepare(
    weight: torch.Tensor, device: torch.device = CPU, *, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight [N, K]`` (bfloat16, float16 or float32) repacked for ``device``, in its own dtype.

    bias: ``[N]``, added to every row of a product. Raises ``ValueError`` for shapes and
    ``TypeError`` for another dtype.
    """
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"the weight is {weight.dtype}, expected bfloat16, float16 or float32")
    if weight.dim() != 2:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, expected [N, K]")
    check_bias(bias, weight.size(0))
    backend = choose("dense_matmul", device).backend
    if backend is Backend.CPU:
        return from_native(cpu.pack(weight, bias))
    if backend is Backend.TRITON:
        packed: PackedWeight = load_kernel("dense_matmul").prepare(weight, device, bias)
        return packed
    return reference.prepare(weight, device, bias)


def dense_matmul(
    x: torch.Tensor, weight: PackedWeight, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``y[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]``, accumulated in float32.

    Shapes, strides and errors: see ``packed_weight.multiply``.
    """
    return multiply(x, weight, out=out, activations=Activations.FLOAT32)
