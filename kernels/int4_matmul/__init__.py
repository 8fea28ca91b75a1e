"""Activations times a 4-bit grouped weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul import cpu, reference
from qserve.kernels.int4_matmul.planar4 import Planar4Weight, pack_planar4
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.rows import check_output, check_rows

__all__ = ["Activations", "Int4Weight", "from_native", "int4_matmul", "prepare"]

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """A 4-bit weight in the layout of the backend that multiplies with it.

    nbytes: memory the layout takes. multiply: writes the product of its first argument to its
    second; both are checked by ``int4_matmul`` before. native: the layout on a CPU.
    """

    in_features: int
    out_features: int
    group_size: int
    nbytes: int
    backend: Backend
    multiply: Callable[[torch.Tensor, torch.Tensor, Activations], None]
    native: NativeWeight | None = None


def prepare(weight: GroupedWeight, device: torch.device = CPU) -> Int4Weight:
    """``weight`` repacked once for fast products on ``device``; ``weight`` itself is no longer
    needed.

    Codes of 2, 3 and 4 bits are taken. A group size that is no multiple of 32 runs on the
    reference. Raises ``ValueError`` for wider codes.
    """
    if weight.bits > 4:
        raise ValueError(f"the weight has {weight.bits} bits, expected at most 4")
    backend = choose("int4_matmul", device).backend
    if weight.group_size % cpu.GROUP_MULTIPLE:  # planar4 has planes of the same 32 inputs
        backend = Backend.REFERENCE
    if backend is Backend.CPU:
        return from_native(cpu.pack(weight))
    multiply: Callable[[torch.Tensor, torch.Tensor, Activations], None]
    if backend is Backend.TRITON:
        packed = pack_planar4(_move(weight, device))
        multiply = partial(_run_kernel, load_kernel("int4_matmul").int4_matmul, packed)
        nbytes = packed.words.nbytes + packed.parameters.nbytes
    else:
        dense = weight.dequantize().to(device)
        multiply, nbytes = partial(_run_reference, dense), dense.nbytes
    return Int4Weight(
        in_features=weight.in_features,
        out_features=weight.out_features,
        group_size=weight.group_size,
        nbytes=nbytes,
        backend=backend,
        multiply=multiply,
    )


def from_native(native: NativeWeight) -> Int4Weight:
    """The weight that lies in a native layout, packed here or attached."""
    out_features, in_features, group_size, _ = native.sizes
    return Int4Weight(
        in_features=in_features,
        out_features=out_features,
        group_size=group_size,
        nbytes=native.nbytes,
        backend=Backend.CPU,
        multiply=partial(cpu.multiply, native),
        native=native,
    )


def int4_matmul(
    x: torch.Tensor,
    weight: Int4Weight,
    *,
    out: torch.Tensor | None = None,
    activations: Activations = Activations.INT8,
) -> torch.Tensor:
    """``y[m, n] = sum_k a[m, k] * (codes[n, k] - zero_points[n, k // G]) * scales[n, k // G]``

    x: ``[M, K]`` with contiguous rows, float32 on a CPU. ``a`` is ``x`` itself (FLOAT32), or ``x``
    rounded to int8 for each row and group of 32 inputs (INT8, see ``activations.quantize_rows``).
    On a GPU ``a`` is always ``x``. out: ``[M, N]``, written and returned; must not overlap ``x``. A
    row of the result does not depend on the other rows or on the number of threads, to the bit.
    Raises ``ValueError`` for shapes and ``TypeError`` for dtypes that do not fit.
    """
    check_rows("x", x, weight.in_features)
    out = check_output(x, weight.out_features, out)
    weight.multiply(x, out, activations)
    return out


def _run_reference(
    weight: torch.Tensor, x: torch.Tensor, out: torch.Tensor, activations: Activations
) -> None:
    reference.int4_matmul(x, weight, out, activations)


def _run_kernel(
    kernel: Callable[[torch.Tensor, Planar4Weight, torch.Tensor], None],
    weight: Planar4Weight,
    x: torch.Tensor,
    out: torch.Tensor,
    activations: Activations,
) -> None:
    kernel(x, weight, out)  # 16-bit activations as they are: tensor cores multiply those


def _move(weight: GroupedWeight, device: torch.device) -> GroupedWeight:
    return GroupedWeight(
        codes=weight.codes.to(device),
        scales=weight.scales.to(device),
        zero_points=weight.zero_points.to(device),
        bits=4,  # narrower codes are 4-bit codes that use fewer values
        group_size=weight.group_size,
    )
