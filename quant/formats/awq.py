"""AutoAWQ's "gemm" format (owner: AutoAWQ 0.2.9, `awq/modules/linear/gemm.py`).

Tensors of a linear layer with K inputs and N outputs, groups of G inputs:

    qweight  int32   [K, N/8]    row k packs the codes of outputs 8c .. 8c+7, fields in AWQ order
    qzeros   int32   [K/G, N/8]  zero points, packed the same way, no offset
    scales   float16 [K/G, N]
    bias     as in the float checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packing import pack_awq, unpack_awq
from qserve.quant.errors import CheckpointError, UnsupportedModelError

BITS = 4
CODES_PER_WORD = 8
TENSORS = ("qweight", "qzeros", "scales")
OUT_FEATURES_MULTIPLE = 32  # AutoAWQ's packer sizes its words as N // 32 * 4


def config_block(group_size: int, ignored: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``, with AutoAWQ's keys.

    ignored: full names of the linear modules left in 16 bits. Readers match them in different
        ways (substring, anchored pattern, ending); full names fit all of them.
    """
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ignored or None,
    }


def group_size_from(config: Mapping[str, Any]) -> int:
    """The group size that a ``quantization_config`` states.

    Raises ``UnsupportedModelError`` unless the block describes 4 bits in the gemm layout.
    """
    bits = config.get("bits", config.get("w_bit"))
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if bits != BITS or version != "gemm":
        raise UnsupportedModelError(
            f"AWQ with {bits} bits in the {version!r} layout: only 4 bits in the 'gemm' layout "
            "can be read; quantize the float checkpoint again"
        )
    group_size = config.get("group_size", config.get("q_group_size"))
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size <= 0:
        raise UnsupportedModelError(
            f"AWQ group_size {group_size!r}: expected a positive number such as 32, 64 or 128"
        )
    return group_size


def pack(weight: GroupedWeight) -> dict[str, torch.Tensor]:
    """``qweight``, ``qzeros`` and ``scales`` of one linear layer.

    Raises ``ValueError`` unless the weight has 4 bits, N % 32 == 0, codes and zero points within
    4 bits, and scales that are finite and not zero in float16.
    """
    if weight.bits != BITS:
        raise ValueError(f"AWQ gemm holds 4-bit codes, got {weight.bits} bits")
    if weight.out_features % OUT_FEATURES_MULTIPLE:
        raise ValueError(
            f"AWQ gemm needs a multiple of {OUT_FEATURES_MULTIPLE} outputs, "
            f"got {weight.out_features}"
        )
    scales = weight.scales.T.contiguous().to(torch.float16)
    if not _usable(scales):
        raise ValueError(
            "a scale is zero, infinite or NaN in float16, which is what AWQ stores: expected "
            "magnitudes of 6e-8 to 65504"
        )
    return {
        "qweight": pack_awq(weight.codes.T.contiguous()),
        "qzeros": pack_awq(weight.zero_points.T.contiguous()),
        "scales": scales,
    }


def layer_shape(shapes: Mapping[str, Sequence[int]], group_size: int, name: str) -> tuple[int, int]:
    """``(out_features, in_features)`` of layer ``name``, from the shapes of its three tensors.

    Raises ``CheckpointError`` when a tensor is missing or the shapes do not close.
    """
    missing = [key for key in TENSORS if key not in shapes]
    if missing:
        raise CheckpointError(f"{name}: {', '.join(missing)} missing: the checkpoint is incomplete")
    qweight, qzeros, scales = (tuple(shapes[key]) for key in TENSORS)
    in_features, num_words = qweight if len(qweight) == 2 else (0, 0)
    num_groups, rest = divmod(in_features, group_size)
    out_features = num_words * CODES_PER_WORD
    closes = qzeros == (num_groups, num_words) and scales == (num_groups, out_features)
    if rest or not num_groups or not closes:
        raise CheckpointError(
            f"{name}: qweight {qweight}, qzeros {qzeros} and scales {scales} do not fit groups of "
            f"{group_size}: expected [inputs, outputs/8], [inputs/{group_size}, outputs/8] and "
            f"[inputs/{group_size}, outputs]; config.json and the tensors disagree"
        )
    return out_features, in_features


def unpack(tensors: Mapping[str, torch.Tensor], group_size: int, name: str) -> GroupedWeight:
    """The weight that ``qweight``, ``qzeros`` and ``scales`` of layer ``name`` hold.

    Raises ``CheckpointError`` when a tensor is missing, has another dtype, when the shapes do not
    close, or when a scale is zero or not finite.
    """
    layer_shape({key: tensor.shape for key, tensor in tensors.items()}, group_size, name)
    qweight, qzeros, scales = (tensors[key] for key in TENSORS)
    if {qweight.dtype, qzeros.dtype} != {torch.int32} or not scales.is_floating_point():
        raise CheckpointError(
            f"{name}: qweight {qweight.dtype}, qzeros {qzeros.dtype}, scales {scales.dtype}: "
            "expected int32, int32 and float16; this is not AWQ's gemm layout"
        )
    if not _usable(scales):
        raise CheckpointError(
            f"{name}: scales hold zero, infinite or NaN values: the file is damaged"
        )
    return GroupedWeight(
        codes=unpack_awq(qweight).T.contiguous(),
        scales=scales.T.contiguous(),
        zero_points=unpack_awq(qzeros).T.contiguous(),
        bits=BITS,
        group_size=group_size,
    )


def _usable(scales: torch.Tensor) -> bool:
    return bool(torch.isfinite(scales).all()) and not bool((scales == 0).any())
