"""Round to nearest, on a grid that the weights alone choose: no text is read.

With groups that span their weights it is the baseline that every other method has to beat, and the
shortest of them.
"""

from __future__ import annotations

import torch

from qserve.quant.block_result import BlockResult
from qserve.quant.codes import join_rows
from qserve.quant.decoder import Block
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.grid import ChooseGrid, Rounded, grid_over_all, nearest_levels
from qserve.quant.plan import Plan
from qserve.quant.report import LayerReport, relative_error
from qserve.quant.stacked_rows import pieces_of
from qserve.quant.steps import Rounding
from qserve.quant.target import StageSpec


def quantize_block(
    block: Block, plan: Plan, choose_grid: ChooseGrid = grid_over_all
) -> BlockResult:
    """Codes for every linear layer of the plan in a block."""
    weights: dict[str, QuantizedWeight] = {}
    layers = []
    for stage in block.stages:
        spec = plan.spec(block, stage)
        if spec is None:
            continue
        for name in stage.linears:
            weight = block.linear(name).weight.detach()
            weights[name], error = _round(weight, spec, choose_grid)
            layers.append(
                LayerReport(
                    name=block.full_name(name),
                    in_features=weight.shape[1],
                    out_features=weight.shape[0],
                    bits=spec.levels.bits,
                    group_size=spec.width(weight.shape[1]),
                    reason=spec.reason,
                    rounded_error=error,
                    error=error,
                    clipped_share=0.0,
                    scale=None,
                    rounding=Rounding.NEAREST.value,
                )
            )
    return BlockResult(weights, tuple(layers), error=None)


def _round(
    weight: torch.Tensor, spec: StageSpec, choose_grid: ChooseGrid
) -> tuple[QuantizedWeight, float]:
    """The codes of a weight ``[N, K]``, and their squared error relative to it."""
    codes = []
    energy = error = 0.0
    for piece in pieces_of([weight], whole=spec.levels.nested):
        rows = piece.read()
        groups = rows.unflatten(1, (-1, spec.width(rows.shape[1])))
        grid = choose_grid(groups, spec.levels).settled()
        rounded = Rounded(nearest_levels(groups, grid), grid)
        codes.append(rounded.pack())
        energy += float(rows.square().sum(dtype=torch.float64))
        error += float(rounded.values().sub_(rows).square_().sum(dtype=torch.float64))
    return join_rows(codes), relative_error(error, energy)
