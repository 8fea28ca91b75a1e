"""Activation-aware quantization, block after block (AWQ: Lin et al. 2023, arXiv 2306.00978).

For each block, with the inputs that the quantized blocks before it produce:

1. transform: the block runs in float on a part of the windows, which gives a Gram matrix for each
   stage. The scales of all stages are chosen by them and folded in: the block computes the same.
2. the block runs on all windows, stage by stage. What a stage receives gives its Gram matrix; range
   and rounding are chosen by it, and the codes replace the weights before the next stage runs.

All scales are known before anything is rounded, so what a scale is folded into (the value and up
projections among others) is divided once, in float, and its codes fit its final float16 scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qserve.quant.architecture import Stage
from qserve.quant.block_result import BlockResult, QuantizedWeight
from qserve.quant.codes import choose_codes
from qserve.quant.decoder import Block, ScratchMemory
from qserve.quant.errors import CheckpointError
from qserve.quant.folding import fold_, settle_, sharing_of
from qserve.quant.grid import LevelSet, grid_over_all, rounding_difference
from qserve.quant.objective import GramMatrix, output_errors
from qserve.quant.options import QuantizeOptions, Rounding
from qserve.quant.plan import Plan
from qserve.quant.report import LayerReport, ScaleReport
from qserve.quant.scaling import ScaleChoice, ScaleSearch

NUM_TRANSFORM_WINDOWS = 8
"""Windows, of those given, that choose the scales: two exponents need little data."""

MIN_TOKENS_PER_INPUT = 4
"""Calibration tokens for each input of a layer that error feedback needs: it uses all of the Gram
matrix, and with fewer tokens it would learn the text by heart. Range and scale need far less."""


@dataclass(frozen=True, slots=True)
class _Transformed:
    """A block whose scales are folded in.

    scales: of each stage that is quantized, as applied. entered, left: hidden states of the
    transform windows before and after the float block.
    """

    scales: dict[str, ScaleChoice]
    entered: torch.Tensor
    left: torch.Tensor


class AwqQuantizer:
    """Quantizes the blocks of one model in their order.

    hidden: ``[num_windows, seq_len, hidden_size]``, what the first block receives; becomes what the
    quantized model has after the last one.
    """

    def __init__(self, hidden: torch.Tensor, plan: Plan, options: QuantizeOptions) -> None:
        self._hidden = hidden
        self._plan = plan
        self._levels = LevelSet(options.bits)
        self._rounding = options.rounding
        self._scratch = ScratchMemory()
        self._stride = max(1, hidden.shape[0] // NUM_TRANSFORM_WINDOWS)

    def quantize_block(self, block: Block) -> BlockResult:
        """Codes for every linear layer of the plan in the next block."""
        transformed = self._transform_(block)
        settle_(block, self._plan)
        weights: dict[str, QuantizedWeight] = {}
        layers: list[LayerReport] = []
        for stage, inputs in block.walk_(self._hidden, self._scratch):
            if self._plan.includes(block, stage):
                scale = transformed.scales[stage.name]
                gram = _gram_of(block, stage, inputs)
                codes, reports = self._quantize_stage_(block, stage, gram, scale)
                weights |= codes
                layers += reports
        return BlockResult(weights, tuple(layers), self._block_error(transformed))

    def _transform_(self, block: Block) -> _Transformed:
        """Choose and fold the scales of a float block."""
        left = self._hidden[:: self._stride].clone()
        entered = left.clone()
        grams = {
            stage.name: _gram_of(block, stage, inputs)
            for stage, inputs in block.walk_(left, self._scratch)
        }
        scales = {}
        for stage in block.stages:
            if self._plan.includes(block, stage):
                weight = torch.cat([block.linear(name).weight for name in stage.linears])
                search = ScaleSearch(
                    weight,
                    grams[stage.name],
                    self._plan.group_size,
                    self._levels,
                    sharing_of(block, stage),
                )
                choice = search.run()
                applied = fold_(block, stage, choice.scale)
                scales[stage.name] = replace(choice, scale=applied)
        return _Transformed(scales, entered, left)

    def _quantize_stage_(
        self, block: Block, stage: Stage, gram: torch.Tensor, choice: ScaleChoice
    ) -> tuple[dict[str, QuantizedWeight], list[LayerReport]]:
        """Replace the weights of a stage by what their codes stand for."""
        linears = [block.linear(name) for name in stage.linears]
        weight = torch.cat([linear.weight for linear in linears])
        rounding = self._rounding_for(len(gram))
        quantized = choose_codes(weight, gram, self._plan.group_size, self._levels, rounding)
        rounded = quantized.values()
        errors = output_errors(rounded - weight, gram)
        baseline = output_errors(self._unscaled_difference(weight, choice.scale), gram)
        energies = output_errors(weight, gram)
        clipped = quantized.clipped(weight)
        sizes = [linear.out_features for linear in linears]
        parts = [part.pack() for part in quantized.split(sizes)]
        codes = dict(zip(stage.linears, parts, strict=True))
        reports = []
        for name, linear, rows in zip(
            stage.linears, linears, torch.arange(len(weight)).split(sizes), strict=True
        ):
            linear.weight.copy_(rounded[rows])
            energy = float(energies[rows].sum())
            reports.append(
                LayerReport(
                    name=block.full_name(name),
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    rounded_error=float(baseline[rows].sum()) / energy,
                    error=float(errors[rows].sum()) / energy,
                    clipped_share=float(clipped[rows].float().mean()),
                    scale=_scale_report(choice),
                    rounding=rounding.value,
                )
            )
        return codes, reports

    def _rounding_for(self, num_inputs: int) -> Rounding:
        """The rounding that was asked for, unless there are too few tokens to learn it from."""
        num_tokens = self._hidden.shape[0] * self._hidden.shape[1]
        enough = num_tokens >= MIN_TOKENS_PER_INPUT * num_inputs
        return self._rounding if enough else Rounding.NEAREST

    def _unscaled_difference(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What rounding to nearest without a scale would do, in the scaled coordinates."""
        groups = (weight / scale).unflatten(1, (-1, self._plan.group_size))
        difference = rounding_difference(groups, grid_over_all(groups, self._levels))
        return difference.flatten(1).mul_(scale)

    def _block_error(self, transformed: _Transformed) -> float:
        difference = self._hidden[:: self._stride] - transformed.left
        added = transformed.left - transformed.entered
        return float(difference.square().sum() / added.square().sum())


def _gram_of(block: Block, stage: Stage, inputs: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of the inputs ``[S, T, K]`` of a stage, added window by window."""
    gram = GramMatrix(inputs.shape[-1])
    for window in inputs:
        gram.add(window)
    mean = gram.mean()
    if not bool(torch.isfinite(mean).all()):
        raise CheckpointError(
            f"{block.full_name(stage.linears[0])} receives infinite or NaN inputs: the model "
            "overflows on the calibration text, its weights are damaged"
        )
    return mean


def _scale_report(choice: ScaleChoice) -> ScaleReport:
    return ScaleReport(
        choice.input_exponent,
        choice.weight_exponent,
        float(choice.scale.min()),
        float(choice.scale.max()),
    )
