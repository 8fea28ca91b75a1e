"""Moving a scale from the inputs of a stage to what computes them: the model stays the same."""

from __future__ import annotations

from typing import Any

import torch

from qserve.quant.architecture import Fold, Stage
from qserve.quant.decoder import Block
from qserve.quant.plan import Plan
from qserve.quant.scaling import HeadSharing
from qserve.quant.storage import as_stored


def sharing_of(block: Block, stage: Stage) -> HeadSharing | None:
    """Which inputs of a stage must share a scale; None when each has one of its own."""
    if stage.fold is not Fold.VALUE_ROWS:
        return None
    attention: Any = block.module("self_attn")
    return HeadSharing(attention.head_dim, attention.num_key_value_groups)


def fold_(block: Block, stage: Stage, scale: torch.Tensor) -> torch.Tensor:
    """Multiply the weights of a stage by ``scale [K]`` and divide what computes its inputs by it.

    Returns the scale that was applied. Behind a norm, where all layers that read it are multiplied,
    it differs from the asked one in the last digits: the divided norm is rounded to the type it is
    stored in first, and the scale is the quotient of the two, so that the stored model computes the
    same function. Where a norm adds an offset to what is stored (Gemma), small factors are coarser
    than that, and the scales with them.
    """
    if stage.fold is Fold.NORM:
        weight, offset = (
            block.module(stage.previous).get_parameter("weight"),
            block.architecture.norm_offset,
        )
        factor = weight + offset
        stored = as_stored(factor / scale - offset)
        divided = stored + offset
        usable = divided != 0
        scale = torch.where(usable, factor / divided, 1.0)
        weight.copy_(torch.where(usable, stored, weight))
    else:
        previous = block.linear(stage.previous)
        sharing = sharing_of(block, stage)
        by_row = scale if sharing is None else sharing.of_rows(scale)
        previous.weight[-len(by_row) :].div_(by_row[:, None])
        if previous.bias is not None:
            previous.bias[-len(by_row) :].div_(by_row)
    for reader in block.readers(stage):
        for name in reader.linears:
            block.linear(name).weight.mul_(scale)
    return scale


def settle_(block: Block, plan: Plan) -> None:
    """Round every parameter that stays in 16 bits to what a reader of the checkpoint will see."""
    quantized = {f"{name}.weight" for name in plan.names_in(block)}
    for name, parameter in block.layer.named_parameters():
        if name not in quantized:
            parameter.copy_(as_stored(parameter))
