"""Weights of codes in the layout of the native kernels: panels of 16 outputs, each one run of
memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from qserve.kernels.activations import ACTIVATION_GROUP
from qserve.kernels.native_weight import NativeWeight


class PanelFormat(Enum):
    """What the codes are: numbers of the extension's enum (kernels/csrc/matmul_kernels.h)."""

    INT2 = 0
    INT3 = 1
    INT4 = 2
    INT8 = 3
    INT8_ZEROS = 4
    CODEBOOK = 5
    FLOAT8 = 6


@dataclass(frozen=True, slots=True)
class PanelSource:
    """The arrays that panels are made of.

    codes: ``[N, K]``, one byte each. scales: ``[N, ceil(K / group_size)]``. zero_points: uint8 like
    ``scales``, for the formats that have them. bias: ``[N]``. input_order: int64 ``[K]``. codebook:
    float32 ``[16]``, in units of its rounding to int8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    input_order: torch.Tensor | None = None
    codebook: torch.Tensor | None = None


def suits_panels(group_size: int, in_features: int) -> bool:
    """Whether panels can have groups of this size: multiples of 32, or whole rows."""
    return group_size % ACTIVATION_GROUP == 0 or group_size == in_features


def pack_panels(format: PanelFormat, source: PanelSource, group_size: int) -> NativeWeight:
    """A weight in panels. Scales are kept in float16 where that loses nothing, else in float32."""
    out_features, in_features = source.codes.shape
    scales = source.scales.float()
    wide = not torch.equal(scales.half().float(), scales)
    native = NativeWeight(
        "PanelWeight",
        (
            out_features,
            in_features,
            format.value,
            group_size,
            wide,
            source.bias is not None,
            source.input_order is not None,
        ),
    )
    arrays = (
        source.codes.view(torch.uint8),
        scales,
        source.zero_points,
        None if source.bias is None else source.bias.float(),
        source.input_order,
        source.codebook,
    )
    kept = [None if array is None else array.contiguous() for array in arrays]
    native.pack(*(0 if array is None else array.data_ptr() for array in kept))
    return native
