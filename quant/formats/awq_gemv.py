"""AWQ's layouts for single rows, which are only read (owners: AutoAWQ 0.2.9, llm-awq).

gemv packs a row's codes along K in order, its zero points likewise, with scales beside them:

    qweight  int32   [N, K/8]
    qzeros   int32   [N, Z]      Z: ceil(K/G / 8), rounded up to 1, 2 (G = 64) or 4 (G = 32) words
    scales   float16 [N, 8 Z]    the first K/G columns count

gemv_fast (llm-awq calls its zeros ``scaled_zeros``) interleaves 4 rows in words of 16 bits:

    qweight  int16   [N/4, K]
    scales   float16 [8 Z, N]
    qzeros   float16 [8 Z, N]    -(scale * zero point)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packing import unpack_words
from qserve.quant.formats.layer_format import (
    FLOATS,
    PackedLayer,
    StoredTensor,
    check_scales,
    refuse_shapes,
    require,
)

BITS = 4
CODES_PER_WORD = 8
ROWS, COLUMNS = 4, 64  # of a block of gemv_fast


def describe_gemv(layer: str, stored: Mapping[str, StoredTensor], group_size: int) -> PackedLayer:
    """The layer by its stored. Raises ``CheckpointError`` when they do not close."""
    require(layer, stored, {"qweight": ["I32"], "qzeros": ["I32"], "scales": FLOATS})
    out_features, num_words = (*stored["qweight"].shape, 0, 0)[:2]
    in_features = num_words * CODES_PER_WORD
    group_size = in_features if group_size == -1 else group_size
    num_groups, rest = divmod(in_features, group_size or 1)
    words = padded_words(num_groups, group_size)
    closes = stored["qzeros"].shape == (out_features, words) and stored["scales"].shape == (
        out_features,
        words * CODES_PER_WORD,
    )
    if rest or not num_groups or not closes:
        raise refuse_shapes(layer, stored, f"AWQ's gemv layout in groups of {group_size}")
    return PackedLayer(out_features, in_features, BITS, group_size)


def describe_fast(layer: str, stored: Mapping[str, StoredTensor], group_size: int) -> PackedLayer:
    """The layer by its stored. Raises ``CheckpointError`` when they do not close."""
    zeros = "scaled_zeros" if "scaled_zeros" in stored else "qzeros"
    require(layer, stored, {"qweight": ["I16"], zeros: FLOATS, "scales": FLOATS})
    num_blocks, in_features = (*stored["qweight"].shape, 0, 0)[:2]
    out_features = num_blocks * ROWS
    group_size = in_features if group_size == -1 else group_size
    num_groups, rest = divmod(in_features, group_size or 1)
    rows = padded_words(num_groups, group_size) * CODES_PER_WORD
    closes = stored[zeros].shape == stored["scales"].shape == (rows, out_features)
    if rest or in_features % COLUMNS or not num_groups or not closes:
        raise refuse_shapes(layer, stored, f"AWQ's gemv_fast layout in groups of {group_size}")
    return PackedLayer(out_features, in_features, BITS, group_size)


def read_gemv(
    layer: str, tensors: Mapping[str, torch.Tensor], packed: PackedLayer
) -> GroupedWeight:
    """The weight in the gemv layout."""
    num_groups = packed.in_features // packed.group_size
    return GroupedWeight(
        codes=unpack_words(tensors["qweight"], BITS, packed.in_features),
        scales=check_scales(layer, tensors["scales"][:, :num_groups].contiguous()),
        zero_points=unpack_words(tensors["qzeros"], BITS, num_groups),
        bits=BITS,
        group_size=packed.group_size,
    )


def read_fast(
    layer: str, tensors: Mapping[str, torch.Tensor], packed: PackedLayer
) -> GroupedWeight:
    """The weight in the gemv_fast layout. Its zero points are exact again: it rounds their product
    with the scale to float16, far less than a half of a step."""
    num_groups = packed.in_features // packed.group_size
    scales = check_scales(layer, tensors["scales"][:num_groups].T.contiguous())
    zeros = "scaled_zeros" if "scaled_zeros" in tensors else "qzeros"
    scaled = tensors[zeros][:num_groups].T.contiguous()
    zero_points = (-scaled.float() / scales.float()).round().clamp(0, 15).to(torch.uint8)
    words = tensors["qweight"].reshape(-1, packed.in_features // COLUMNS, ROWS, 2, 8)
    fields = torch.stack([words >> (BITS * i) & 15 for i in range(4)], -2)  # [r, t, i, h, p, j]
    codes = fields.to(torch.uint8).permute(0, 2, 1, 3, 4, 5)
    return GroupedWeight(
        codes=codes.reshape(packed.out_features, packed.in_features),
        scales=scales,
        zero_points=zero_points,
        bits=BITS,
        group_size=packed.group_size,
    )


def padded_words(num_groups: int, group_size: int) -> int:
    """Words of 8 zero points that a row takes."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    words = -(-num_groups // CODES_PER_WORD)
    return -(-words // multiple) * multiple
