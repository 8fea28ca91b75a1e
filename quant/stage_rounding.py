"""The codes of one stage, and what the report says of its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.quant.allocation import return_freed
from qserve.quant.architecture import Stage
from qserve.quant.codes import Coder, join_rows
from qserve.quant.decoder import Block
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.grid import Rounded, grid_over_all, rounding_difference
from qserve.quant.objective import output_errors
from qserve.quant.report import LayerReport, ScaleReport, relative_error
from qserve.quant.scaling import ScaleChoice
from qserve.quant.seen import TokenCount
from qserve.quant.stacked_rows import Piece, pieces_of
from qserve.quant.steps import Steps
from qserve.quant.target import StageSpec


@dataclass(frozen=True, slots=True)
class StageResult:
    """The layers of a stage by their names: their codes, and what they cost."""

    codes: dict[str, QuantizedWeight]
    reports: tuple[LayerReport, ...]


@dataclass(frozen=True, slots=True)
class StageRounding:
    """How the weights of a stage become codes.

    gram: of what its layers receive, ``[K, K]``. choice: the scale that is in the weights. count:
    of the tokens that the Gram matrix is of.
    """

    spec: StageSpec
    gram: torch.Tensor
    steps: Steps
    choice: ScaleChoice | None
    count: TokenCount

    def run_(self, block: Block, stage: Stage) -> StageResult:
        """Choose the codes, and replace the weights by what they stand for."""
        weights = [block.linear(name).weight for name in stage.linears]
        coder = Coder(self.gram, self.spec.width(len(self.gram)), self.spec.levels, self.steps)
        codes: list[list[QuantizedWeight]] = [[] for _ in weights]
        costs: list[list[torch.Tensor]] = [[] for _ in weights]
        # Nested scales are quantized a whole layer at a time.
        for piece in pieces_of(weights, whole=self.spec.levels.nested):
            for layer, part, cost in self._round_(piece, coder):
                codes[layer].append(part)
                costs[layer].append(cost)
            return_freed()
        names = stage.linears
        return StageResult(
            {name: join_rows(pieces) for name, pieces in zip(names, codes, strict=True)},
            tuple(
                self._report(block, name, torch.cat(some, 1))
                for name, some in zip(names, costs, strict=True)
            ),
        )

    def _round_(
        self, piece: Piece, coder: Coder
    ) -> list[tuple[int, QuantizedWeight, torch.Tensor]]:
        """Of each layer that has rows in a piece: which it is, its codes, and their cost."""
        chosen = coder.choose(piece.read())
        values = chosen.values()
        costs = self._cost(piece.read(), chosen, values).split(piece.sizes, 1)
        piece.write_(values)
        parts = [chosen] if len(piece.sizes) == 1 else chosen.split(piece.sizes)
        packed = [part.pack() for part in parts]
        return list(zip(piece.layers, packed, costs, strict=True))

    def _cost(self, weight: torch.Tensor, chosen: Rounded, values: torch.Tensor) -> torch.Tensor:
        """For each of some rows: output errors as stored and as rounded to nearest without a scale,
        the energy of the outputs, and the number of clipped weights; float64 ``[4, n]``."""
        return torch.stack(
            [
                output_errors(values - weight, self.gram),
                output_errors(self._unscaled_difference(weight), self.gram),
                output_errors(weight, self.gram),
                chosen.clipped(weight).sum(1).double(),
            ]
        )

    def _unscaled_difference(self, weight: torch.Tensor) -> torch.Tensor:
        """What rounding to nearest without a scale would do, in the scaled coordinates."""
        scale = torch.ones(weight.shape[1]) if self.choice is None else self.choice.scale
        groups = (weight / scale).unflatten(1, (-1, self.spec.width(len(scale))))
        grid = grid_over_all(groups, self.spec.levels).settled()
        return rounding_difference(groups, grid).flatten(1).mul_(scale)

    def _report(self, block: Block, name: str, cost: torch.Tensor) -> LayerReport:
        layer = block.linear(name)
        error, baseline, energy, num_clipped = cost.sum(1).tolist()
        return LayerReport(
            name=block.full_name(name),
            in_features=layer.in_features,
            out_features=layer.out_features,
            bits=self.spec.levels.bits,
            group_size=self.spec.width(layer.in_features),
            reason=self.spec.reason,
            rounded_error=relative_error(baseline, energy),
            error=relative_error(error, energy),
            clipped_share=num_clipped / layer.weight.numel(),
            scale=None if self.choice is None else _scale_report(self.choice),
            rounding=self.steps.rounding.value,
            num_tokens=self.count.num_tokens,
            num_borrowed=self.count.num_borrowed,
        )


def _scale_report(choice: ScaleChoice) -> ScaleReport:
    return ScaleReport(
        choice.input_exponent,
        choice.weight_exponent,
        float(choice.scale.min()),
        float(choice.scale.max()),
    )
