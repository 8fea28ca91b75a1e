"""Activations times an 8-bit symmetric grouped weight, such as an output head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from qserve.kernels.activations import MAX_CODE, Activations
from qserve.kernels.backend import Backend, choose
from qserve.kernels.int8_matmul import cpu, reference
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.rows import check_output, check_rows

__all__ = ["Activations", "Int8Weight", "from_native", "int8_matmul", "prepare", "quantize_int8"]

DEFAULT_GROUP_SIZE = 64
ROWS_AT_ONCE = 256
"""Rows that are rounded together: their temporaries stay in the cache. A head of 49152 x 576 takes
0.07 s instead of 0.43, and 200 MB less."""


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """An 8-bit weight in the layout of the backend that multiplies with it.

    nbytes: memory the layout takes. multiply: writes the product of its first argument to its
    second; both are checked by ``int8_matmul`` before. native: the layout on a CPU.
    """

    in_features: int
    out_features: int
    group_size: int
    nbytes: int
    backend: Backend
    multiply: Callable[[torch.Tensor, torch.Tensor, Activations], None]
    native: NativeWeight | None = None


def quantize_int8(weight: torch.Tensor, group_size: int = DEFAULT_GROUP_SIZE) -> Int8Weight:
    """``weight [N, K]`` of any float dtype rounded to nearest, symmetric, a scale for
    ``group_size`` inputs.

    The last group of a row is short where ``K`` is no multiple of ``group_size``. Scales are
    float16 where its range allows; codes are rounded with the scale that is stored. Raises what
    ``prepare`` raises.
    """
    parts = [round_weight(rows, group_size) for rows in weight.split(ROWS_AT_ONCE)]
    codes = torch.cat([codes for codes, _ in parts])
    return prepare(codes, torch.cat([scales for _, scales in parts]), group_size)


def round_weight(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 codes ``[N, K]`` in -127..127 and float32 scales ``[N, ceil(K / group_size)]`` of a
    float weight."""
    width = weight.size(1)
    padded = torch.nn.functional.pad(weight.float(), (0, -width % group_size))
    groups = padded.unflatten(1, (-1, group_size))
    scales = groups.abs().amax(2) / MAX_CODE
    half = scales.half().float()
    smallest_normal = torch.finfo(torch.float16).tiny
    if bool(((half >= smallest_normal) & half.isfinite() | (scales == 0)).all()):
        scales = half
    divisors = torch.where(scales > 0, scales, 1.0)
    codes = (groups / divisors[..., None]).round().clamp(-MAX_CODE, MAX_CODE)
    return codes.to(torch.int8).flatten(1)[:, :width].contiguous(), scales


def prepare(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> Int8Weight:
    """A weight ``codes[n, k] * scales[n, k // group_size]`` repacked for fast products where
    ``codes`` is.

    codes: int8 ``[N, K]``, values -127..127. scales: float ``[N, ceil(K / group_size)]``. Raises
    ``ValueError`` for shapes or codes and ``TypeError`` for dtypes that do not fit.
    """
    _check_codes(codes, scales, group_size)
    out_features, in_features = codes.shape
    backend = choose("int8_matmul", codes.device).backend
    if backend is Backend.CPU and group_size % cpu.GROUP_MULTIPLE:
        backend = Backend.REFERENCE
    if backend is Backend.CPU:
        return from_native(cpu.pack(codes, scales, group_size))
    spread = scales.float().repeat_interleave(group_size, 1)[:, :in_features]
    dense = codes.float() * spread
    return Int8Weight(
        in_features=in_features,
        out_features=out_features,
        group_size=group_size,
        nbytes=dense.nbytes,
        backend=backend,
        multiply=partial(_run_reference, dense),
    )


def from_native(native: NativeWeight) -> Int8Weight:
    """The weight that lies in a native layout, packed here or attached."""
    out_features, in_features, group_size, _ = native.sizes
    return Int8Weight(
        in_features=in_features,
        out_features=out_features,
        group_size=group_size,
        nbytes=native.nbytes,
        backend=Backend.CPU,
        multiply=partial(cpu.multiply, native),
        native=native,
    )


def int8_matmul(
    x: torch.Tensor,
    weight: Int8Weight,
    *,
    out: torch.Tensor | None = None,
    activations: Activations = Activations.INT8,
) -> torch.Tensor:
    """``y[m, n] = sum_k a[m, k] * codes[n, k] * scales[n, k // G]``

    x: ``[M, K]`` with contiguous rows, float32 on a CPU. ``a`` is ``x`` itself (FLOAT32), or ``x``
    rounded to int8 for each row and group of 32 inputs (INT8, see ``activations.quantize_rows``).
    out: ``[M, N]``, written and returned; must not overlap ``x``. A row of the result does not
    depend on the other rows or on the number of threads, to the bit. Raises ``ValueError`` for
    shapes and ``TypeError`` for dtypes that do not fit.
    """
    check_rows("x", x, weight.in_features)
    out = check_output(x, weight.out_features, out)
    weight.multiply(x, out, activations)
    return out


def _check_codes(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> None:
    if codes.dtype is not torch.int8 or not scales.is_floating_point():
        raise TypeError(f"codes are {codes.dtype} and scales {scales.dtype}: expected int8, float")
    if codes.dim() != 2 or group_size < 1:
        raise ValueError(f"codes {tuple(codes.shape)} in groups of {group_size}: expected [N, K]")
    expected = (codes.size(0), -(-codes.size(1) // group_size))
    if scales.shape != expected:
        raise ValueError(f"scales have shape {tuple(scales.shape)}, expected {expected}")
    if codes.numel() and int(codes.min()) < -MAX_CODE:
        raise ValueError("a code is -128, expected -127..127: clamp symmetric codes")


def _run_reference(
    weight: torch.Tensor, x: torch.Tensor, out: torch.Tensor, activations: Activations
) -> None:
    reference.int8_matmul(x, weight, out, activations)
