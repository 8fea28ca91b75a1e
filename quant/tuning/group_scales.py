"""The group scales of a packed weight: taken out, put back, and as the formats store them."""

from __future__ import annotations

from dataclasses import replace

import torch

from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.formats.nested_scales import NestedWeight, nest


def scales_of(weight: QuantizedWeight) -> torch.Tensor:
    """The scales that may change, in float32 and in the weight's own layout.

    Of progressive groups (QoQ) these are the outer ones: the inner ones are integers.
    """
    if isinstance(weight, CodebookWeight):
        return weight.block_scales.float()
    if isinstance(weight, GroupedWeight) and weight.channel_scales is not None:
        return weight.channel_scales.float()
    return weight.scales.float()


def with_scales(weight: QuantizedWeight, scales: torch.Tensor) -> QuantizedWeight:
    """The weight with other scales and the same codes.

    Its ``dequantize`` is differentiable in ``scales``: autograd sums the gradient over each group.
    """
    if isinstance(weight, CodebookWeight):
        return replace(weight, block_scales=scales)
    if isinstance(weight, GroupedWeight) and weight.channel_scales is not None:
        return replace(weight, channel_scales=scales)
    return replace(weight, scales=scales)


def as_stored(weight: QuantizedWeight, scales: torch.Tensor) -> QuantizedWeight:
    """The weight with float32 ``scales`` as its format rounds them."""
    if isinstance(weight, NestedWeight):
        nested = nest(scales, weight.nested.offset)
        return replace(weight, block_scales=nested.dequantize(), nested=nested)
    if isinstance(weight, GroupedWeight):
        is_outer = weight.channel_scales is not None  # which QoQ stores in float16
        stored = scales.half().float() if is_outer else scales.to(weight.scales.dtype)
        return with_scales(weight, stored)
    return with_scales(weight, scales)
