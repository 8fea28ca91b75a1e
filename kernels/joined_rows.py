"""Layers of one input as one layer: their outputs one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight, concatenate_rows, joinable
from qserve.kernels.linear_weight import NeutralWeight


def join_rows(weights: Sequence[NeutralWeight]) -> NeutralWeight | None:
    """The weight ``[sum of outputs, inputs]`` that stands for all of ``weights``, to the bit.

    None when their forms differ, or when one of them has scales that do not end with its last row.
    """
    if len(weights) == 1:
        return weights[0]
    dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if len(dense) == len(weights):
        return torch.cat(dense) if len({weight.dtype for weight in dense}) == 1 else None
    grouped = [weight for weight in weights if isinstance(weight, GroupedWeight)]
    if len(grouped) == len(weights):
        return concatenate_rows(grouped) if joinable(grouped) else None
    codebook = [weight for weight in weights if isinstance(weight, CodebookWeight)]
    if len(codebook) == len(weights):
        return _join_codebooks(codebook)
    float8 = [weight for weight in weights if isinstance(weight, Float8Weight)]
    return _join_float8(float8) if len(float8) == len(weights) else None


def _join_codebooks(weights: Sequence[CodebookWeight]) -> CodebookWeight | None:
    first = weights[0]
    for weight in weights:
        same = weight.block_size == first.block_size
        if not same or not torch.equal(weight.codebook, first.codebook):
            return None
    if any(weight.codes.numel() % weight.block_size for weight in weights):
        return None
    return CodebookWeight(
        torch.cat([weight.codes for weight in weights]),
        first.codebook,
        torch.cat([weight.block_scales for weight in weights]),
        first.block_size,
    )


def _join_float8(weights: Sequence[Float8Weight]) -> Float8Weight | None:
    if all(weight.scales.size(1) == 1 for weight in weights):  # of a tensor, or of a row
        weights = [_scale_rows(weight) for weight in weights]
    rows, columns = weights[0].block
    if any(weight.block != (rows, columns) for weight in weights):
        return None
    if any(weight.out_features % rows for weight in weights):
        return None
    values = torch.cat([weight.values.view(torch.uint8) for weight in weights])
    scales = torch.cat([weight.scales for weight in weights])
    return Float8Weight(values.view(torch.float8_e4m3fn), scales, (rows, columns))


def _scale_rows(weight: Float8Weight) -> Float8Weight:
    """With a scale for each row."""
    scales = weight.scales.repeat_interleave(weight.block[0], 0)[: weight.out_features]
    return Float8Weight(weight.values, scales, (1, weight.in_features))
