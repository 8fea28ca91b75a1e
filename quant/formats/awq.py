"""AutoAWQ's "gemm" format (owner: AutoAWQ 0.2.9, `awq/modules/linear/gemm.py`).

Tensors of a linear layer with K inputs and N outputs, groups of G inputs:

    qweight  int32   [K, N/8]    row k packs the codes of outputs 8c .. 8c+7, fields in AWQ order
    qzeros   int32   [K/G, N/8]  zero points, packed the same way, no offset
    scales   float16 [K/G, N]
    bias     as in the float checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packing import pack_awq, unpack_awq
from qserve.quant.errors import CheckpointError, UnsupportedModelError

TENSORS = ("qweight", "qzeros", "scales")
OUT_FEATURES_MULTIPLE = 32  # AutoAWQ's packer sizes its words as N // 32 * 4


def config_block(group_size: int, ignored: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``, with AutoAWQ's keys.

    ignored: full names of the linear modules left in 16 bits; readers match them in different
    ways, full names fit all.
    """
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ignored or None,
    }


def group_size_from(config: Mapping[str, Any]) -> int:
    """The group size of a ``quantization_config``, once it is known to be a 4-bit gemm one."""
    bits = config.get("bits", config.get("w_bit"))
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedModelError(
            f"AWQ with {bits} bits in the {version!r} layout: only 4 bits in the 'gemm' layout "
            "can be read; quantize the float checkpoint again"
        )
    group_size = config.get("group_size", config.get("q_group_size"))
    if not isinstance(group_size, int) or group_size <= 0:
        raise UnsupportedModelError(
            f"AWQ group_size {group_size!r}: expected a positive number such as 32, 64 or 128"
        )
    return group_size


def pack(weight: GroupedWeight) -> dict[str, torch.Tensor]:
    """``qweight``, ``qzeros`` and ``scales`` of one linear layer.

    Raises ``ValueError`` unless it is 4-bit and N % 32 == 0.
    """
    if weight.bits != 4:
        raise ValueError(f"AWQ gemm holds 4-bit codes, got {weight.bits} bits")
    if weight.out_features % OUT_FEATURES_MULTIPLE:
        raise ValueError(
            f"AWQ gemm needs a multiple of {OUT_FEATURES_MULTIPLE} outputs, "
            f"got {weight.out_features}"
        )
    return {
        "qweight": pack_awq(weight.codes.T.contiguous()),
        "qzeros": pack_awq(weight.zero_points.T.contiguous()),
        "scales": weight.scales.T.contiguous().to(torch.float16),
    }


def unpack(tensors: Mapping[str, torch.Tensor], group_size: int, name: str) -> GroupedWeight:
    """The weight that ``qweight``, ``qzeros`` and ``scales`` of layer ``name`` hold.

    Raises ``CheckpointError`` when a tensor is missing, the shapes do not close or a scale is zero
    or not finite.
    """
    missing = [key for key in TENSORS if key not in tensors]
    if missing:
        raise CheckpointError(f"{name}: {', '.join(missing)} missing: the checkpoint is incomplete")
    qweight, qzeros, scales = (tensors[key] for key in TENSORS)
    in_features, num_words = qweight.shape
    shape = (in_features // group_size, num_words * 8)
    if (
        in_features % group_size
        or tuple(scales.shape) != shape
        or tuple(qzeros.shape) != (shape[0], num_words)
    ):
        raise CheckpointError(
            f"{name}: qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)}, scales "
            f"{tuple(scales.shape)} do not fit groups of {group_size}: expected scales {shape}; "
            "config.json and the tensors disagree"
        )
    if not bool(torch.isfinite(scales).all()) or bool((scales == 0).any()):
        raise CheckpointError(
            f"{name}: scales hold zero, infinite or NaN values: the file is damaged"
        )
    return GroupedWeight(
        codes=unpack_awq(qweight).T.contiguous(),
        scales=scales.T.contiguous(),
        zero_points=unpack_awq(qzeros).T.contiguous(),
        bits=4,
        group_size=group_size,
    )
