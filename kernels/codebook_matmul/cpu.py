"""The native layout of codes into a table."""

from __future__ import annotations

import torch

from qserve.kernels.codebook_matmul.reference import round_codebook
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.panels import PanelFormat, PanelSource, pack_panels, suits_panels


def suits(weight: CodebookWeight) -> bool:
    """Whether panels can hold the weight: no row has a part of a block."""
    return _group_size(weight) is not None


def pack(weight: CodebookWeight, bias: torch.Tensor | None) -> NativeWeight:
    """The weight in panels; the step of the rounded codebook is multiplied into the scales."""
    group_size = _group_size(weight)
    if group_size is None:
        raise ValueError(
            f"blocks of {weight.block_size} cross rows of {weight.in_features}: expected whole "
            "blocks, of a multiple of 32, in a row"
        )
    _, step = round_codebook(weight.codebook)
    scales = weight.block_scales.repeat_interleave(weight.block_size // group_size)
    num_groups = weight.codes.numel() // group_size
    source = PanelSource(
        codes=weight.codes,
        scales=(scales[:num_groups] * step).view(weight.out_features, -1),
        bias=bias,
        codebook=weight.codebook / (step or 1.0),
    )
    return pack_panels(PanelFormat.CODEBOOK, source, group_size)


def _group_size(weight: CodebookWeight) -> int | None:
    """Inputs of a row that share a scale: a block, or the whole row where a block is of several."""
    block_size, in_features = weight.block_size, weight.in_features
    group_size = in_features if block_size % in_features == 0 else block_size
    fits = in_features % group_size == 0 and suits_panels(group_size, in_features)
    return group_size if fits else None
