"""Activations times a weight that is not quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from qserve.kernels.backend import Backend, choose
from qserve.kernels.dense_matmul import cpu, reference
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.rows import check_output, check_rows

__all__ = ["DenseWeight", "dense_matmul", "from_native", "prepare"]

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight:
    """A float weight in the layout of the backend that multiplies with it.

    nbytes: memory the layout takes. multiply: writes the product of its first argument to its
    second; both are checked by ``dense_matmul`` before. native: the layout on a CPU.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    nbytes: int
    backend: Backend
    multiply: Callable[[torch.Tensor, torch.Tensor], None]
    native: NativeWeight | None = None


def prepare(weight: torch.Tensor) -> DenseWeight:
    """``weight [N, K]`` (bfloat16, float16 or float32) repacked where it is, in its own dtype.

    Raises ``ValueError`` for another number of dimensions and ``TypeError`` for another dtype.
    """
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"the weight is {weight.dtype}, expected bfloat16, float16 or float32")
    if weight.dim() != 2:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, expected [N, K]")
    backend = choose("dense_matmul", weight.device).backend
    if backend is Backend.CPU:
        return from_native(cpu.pack(weight))
    return DenseWeight(
        in_features=weight.size(1),
        out_features=weight.size(0),
        dtype=weight.dtype,
        nbytes=weight.nbytes,
        backend=backend,
        multiply=partial(_run_reference, weight),
    )


def from_native(native: NativeWeight) -> DenseWeight:
    """The weight that lies in a native layout, packed here or attached."""
    out_features, in_features, float_type = native.sizes
    return DenseWeight(
        in_features=in_features,
        out_features=out_features,
        dtype=cpu.TYPES[float_type],
        nbytes=native.nbytes,
        backend=Backend.CPU,
        multiply=partial(cpu.multiply, native),
        native=native,
    )


def dense_matmul(
    x: torch.Tensor, weight: DenseWeight, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``y[m, n] = sum_k x[m, k] * weight[n, k]``, accumulated in float32.

    x: ``[M, K]`` with contiguous rows, float32 on a CPU.
    out: ``[M, N]``, written and returned; must not overlap ``x``. A row of the result does not
    depend on the other rows or on the number of threads, to the bit.
    Raises ``ValueError`` for shapes and ``TypeError`` for dtypes that do not fit.
    """
    check_rows("x", x, weight.in_features)
    out = check_output(x, weight.out_features, out)
    weight.multiply(x, out)
    return out


def _run_reference(weight: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    reference.dense_matmul(x, weight, out)
