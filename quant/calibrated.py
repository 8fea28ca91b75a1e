"""Quantization that reads text, block after block, for every method that does.

For each block, with the inputs that the quantized blocks before it produce:

1. transform: the block runs in float on a part of the windows, which gives a Gram matrix for each
   stage. The scales of all stages are chosen by them and folded in: the block computes the same.
   (AWQ: Lin et al. 2023, arXiv 2306.00978; SmoothQuant: Xiao et al. 2022, arXiv 2211.10438.)
2. the block runs on all windows, stage by stage. What a stage receives gives its Gram matrix; range
   and rounding are chosen by it, and the codes replace the weights before the next stage runs.
   (GPTQ: Frantar et al. 2022, arXiv 2210.17323.)

   The float model runs beside the quantized one, and each layer aims at making up for what those
   before it have lost: see ``drift.py``.

All scales are known before anything is rounded, so what a scale is folded into (the value and up
projections among others) is divided once, in float, and its codes fit its final stored scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from qserve.kernels.activations import Activations, round_activations
from qserve.quant.architecture import Fold, Stage
from qserve.quant.block_result import BlockResult
from qserve.quant.codes import choose_codes
from qserve.quant.decoder import Block, ScratchMemory
from qserve.quant.drift import Drift, aim
from qserve.quant.errors import CheckpointError
from qserve.quant.folding import fold_, settle_, sharing_of
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.grid import grid_over_all, rounding_difference
from qserve.quant.methods import Profile
from qserve.quant.objective import GramMatrix, output_errors
from qserve.quant.plan import Plan
from qserve.quant.published import PublishedScaleSearch
from qserve.quant.report import LayerReport, ScaleReport, relative_error
from qserve.quant.scaling import ScaleChoice, ScaledStage, ScaleSearch
from qserve.quant.smoothing import SmoothSearch
from qserve.quant.steps import Rounding, Steps, Transform
from qserve.quant.target import StageSpec

NUM_TRANSFORM_WINDOWS = 8
"""Windows, of those given, that choose the scales: two exponents need little data."""

NUM_SMOOTHING_TOKENS = 1024

MIN_TOKENS_PER_INPUT = 4
"""Calibration tokens for each input of a layer that error feedback needs: it uses all of the Gram
matrix, and with fewer tokens it would learn the text by heart. Range and scale need far less."""


Search = Callable[[], ScaleChoice]
"""Finds the scale of a stage, once all stages have been seen."""


@dataclass(frozen=True, slots=True)
class _Transformed:
    """A block whose scales are folded in.

    scales: of each stage that has one, as applied. entered, left: hidden states of the
    transform windows before and after the float block.
    """

    scales: dict[str, ScaleChoice]
    entered: torch.Tensor
    left: torch.Tensor


@dataclass(frozen=True, slots=True)
class _StageResult:
    """The layers of a stage by their names: codes, and the weights ``[N, K]`` they stand for."""

    codes: dict[str, QuantizedWeight]
    rounded: dict[str, torch.Tensor]
    reports: tuple[LayerReport, ...]


class CalibratedQuantizer:
    """Quantizes the blocks of one model in their order.

    hidden: ``[num_windows, seq_len, hidden_size]``, what the first block receives; becomes what the
    quantized model has after the last one. exact: the same for the float model; None: it is not
    followed.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        plan: Plan,
        profile: Profile,
        exact: torch.Tensor | None = None,
    ) -> None:
        self._hidden = hidden
        self._exact = exact
        self._plan = plan
        self._profile = profile
        self._scratch, self._exact_scratch = ScratchMemory(), ScratchMemory()
        self._stride = max(1, hidden.shape[0] // NUM_TRANSFORM_WINDOWS)

    def quantize_block(self, block: Block) -> BlockResult:
        """Codes for every linear layer of the plan in the next block.

        Where activations are rounded too, the layers of the block do so from here on.
        """
        transformed = self._transform_(block)
        settle_(block, self._plan)
        if self._profile.activations is not None:
            block.round_inputs_(self._plan.names_in(block), self._profile.activations)
        weights: dict[str, QuantizedWeight] = {}
        layers: list[LayerReport] = []
        beside = self._walk_beside(block)
        exact_inputs = next(beside)
        for stage, inputs in block.walk_(self._hidden, self._scratch):
            spec = self._plan.spec(block, stage)
            if spec is None:
                exact_inputs = next(beside)
                continue
            gram = self._gram_of(block, stage, inputs, self._profile.activations)
            aim_at = self._aim(block, stage, gram, inputs, exact_inputs)
            scale = transformed.scales.get(stage.name)
            found = self._quantize_stage(block, stage, spec, gram, aim_at, scale)
            exact_inputs = next(beside)  # while the block still has the float weights
            for name, rounded in found.rounded.items():
                block.linear(name).weight.copy_(rounded)
            weights |= found.codes
            layers += found.reports
        return BlockResult(weights, tuple(layers), self._block_error(transformed))

    def _walk_beside(self, block: Block) -> Iterator[torch.Tensor | None]:
        """What the float model gives each stage, one more None at the end.

        Each step runs on the weights that the block has at that moment.
        """
        if self._exact is not None:
            walk = block.walk_(self._exact, self._exact_scratch)
            for _ in block.stages:
                with block.unrounded():
                    _, inputs = next(walk)
                yield inputs
            with block.unrounded():
                next(walk, None)
        while True:
            yield None

    def _aim(
        self,
        block: Block,
        stage: Stage,
        gram: torch.Tensor,
        inputs: torch.Tensor,
        exact_inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """The weights that a stage would best have, given what those before it became."""
        weight = torch.cat([block.linear(name).weight for name in stage.linears])
        if exact_inputs is None or not self._steps_for(len(gram)).follow_float_model:
            return weight
        assert self._exact is not None
        received = self._received(inputs, self._profile.activations)
        hidden = (self._hidden, self._exact) if block.adds(stage) else None
        return aim(weight, gram, Drift(received, exact_inputs, hidden))

    def _transform_(self, block: Block) -> _Transformed:
        """Choose and fold the scales of a float block."""
        left = self._hidden[:: self._stride].clone()
        entered = left.clone()
        searches: dict[str, Search | None] = {
            stage.name: self._search(block, stage, inputs)
            for stage, inputs in block.walk_(left, self._scratch)
        }
        scales = {}
        for stage in block.stages:
            search = searches[stage.name]
            if search is not None:
                choice = search()
                scales[stage.name] = replace(choice, scale=fold_(block, stage, choice.scale))
        return _Transformed(scales, entered, left)

    def _search(self, block: Block, stage: Stage, inputs: torch.Tensor) -> Search | None:
        """What finds the scale of a stage; None for a stage that gets none."""
        transform, spec = self._profile.steps.transform, self._plan.spec(block, stage)
        if transform is Transform.NONE or spec is None:
            return None
        sharing = sharing_of(block, stage)
        weight = torch.cat([block.linear(name).weight for name in stage.linears])
        form = (spec.group_size, spec.levels, sharing)
        if transform in (Transform.SMOOTH, Transform.PUBLISHED_SMOOTH):
            rows = inputs.flatten(0, 1)
            sample = rows[:: -(-len(rows) // NUM_SMOOTHING_TOKENS)].clone()
            smoothing = SmoothSearch(weight, sample, *form)
            if transform is Transform.SMOOTH:
                return smoothing.run
            return smoothing.published if stage.fold is Fold.NORM else None
        gram = self._gram_of(block, stage, inputs, None)
        scaled = ScaledStage(weight, gram, *form)
        if transform is Transform.SCALE:
            return ScaleSearch(scaled).run
        if sharing is not None and sharing.repeats > 1:
            return None  # published for query heads that have key/value heads of their own
        return PublishedScaleSearch(scaled, inputs).run

    def _quantize_stage(
        self,
        block: Block,
        stage: Stage,
        spec: StageSpec,
        gram: torch.Tensor,
        weight: torch.Tensor,
        choice: ScaleChoice | None,
    ) -> _StageResult:
        """The codes of a stage.

        weight: of its layers one above the other, what the codes are to stand for.
        """
        linears = [block.linear(name) for name in stage.linears]
        sizes = [linear.out_features for linear in linears]
        group_size, levels = spec.group_size, spec.levels
        steps = self._steps_for(len(gram))
        # Nested scales are quantized a layer at a time; all else is done in one go.
        pieces = weight.split(sizes) if levels.nested else [weight]
        chosen = [choose_codes(piece, gram, group_size, levels, steps) for piece in pieces]
        parts = chosen if levels.nested else chosen[0].split(sizes)
        rounded = torch.cat([part.values() for part in parts])
        errors = output_errors(rounded - weight, gram)
        baseline = output_errors(_unscaled_difference(weight, spec, choice), gram)
        energies = output_errors(weight, gram)
        clipped = torch.cat(
            [part.clipped(piece) for part, piece in zip(chosen, pieces, strict=True)]
        )
        reports = []
        for name, linear, rows in zip(
            stage.linears, linears, torch.arange(len(weight)).split(sizes), strict=True
        ):
            energy = float(energies[rows].sum())
            reports.append(
                LayerReport(
                    name=block.full_name(name),
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    bits=levels.bits,
                    group_size=group_size,
                    reason=spec.reason,
                    rounded_error=relative_error(float(baseline[rows].sum()), energy),
                    error=relative_error(float(errors[rows].sum()), energy),
                    clipped_share=float(clipped[rows].float().mean()),
                    scale=None if choice is None else _scale_report(choice),
                    rounding=steps.rounding.value,
                )
            )
        return _StageResult(
            codes={name: part.pack() for name, part in zip(stage.linears, parts, strict=True)},
            rounded=dict(zip(stage.linears, rounded.split(sizes), strict=True)),
            reports=tuple(reports),
        )

    def _steps_for(self, num_inputs: int) -> Steps:
        """The steps that were asked for, unless there are too few tokens for error feedback."""
        steps = self._profile.steps
        num_tokens = self._hidden.shape[0] * self._hidden.shape[1]
        enough = num_tokens >= MIN_TOKENS_PER_INPUT * num_inputs
        if enough or steps.rounding is not Rounding.FEEDBACK:
            return steps
        return replace(steps, rounding=Rounding.NEAREST)

    def _block_error(self, transformed: _Transformed) -> float:
        difference = self._hidden[:: self._stride] - transformed.left
        added = transformed.left - transformed.entered
        return float(difference.square().sum() / added.square().sum())

    @staticmethod
    def _received(inputs: torch.Tensor, activations: Activations | None) -> Iterator[torch.Tensor]:
        """Windows ``[T, K]`` of inputs as the layers multiply them."""
        for window in inputs:
            yield window if activations is None else round_activations(window, activations)

    def _gram_of(
        self, block: Block, stage: Stage, inputs: torch.Tensor, activations: Activations | None
    ) -> torch.Tensor:
        """The Gram matrix of the inputs ``[S, T, K]`` of a stage, added window by window.

        activations: how the layers of the stage round them.
        """
        gram = GramMatrix(inputs.shape[-1])
        for window in self._received(inputs, activations):
            gram.add(window)
        mean = gram.mean()
        if not bool(torch.isfinite(mean).all()):
            raise CheckpointError(
                f"{block.full_name(stage.linears[0])} receives infinite or NaN inputs: the model "
                "overflows on the calibration text, its weights are damaged"
            )
        return mean


def _unscaled_difference(
    weight: torch.Tensor, spec: StageSpec, choice: ScaleChoice | None
) -> torch.Tensor:
    """What rounding to nearest without a scale would do, in the scaled coordinates."""
    scale = torch.ones(weight.shape[1]) if choice is None else choice.scale
    groups = (weight / scale).unflatten(1, (-1, spec.group_size))
    grid = grid_over_all(groups, spec.levels).settled()
    return rounding_difference(groups, grid).flatten(1).mul_(scale)


def _scale_report(choice: ScaleChoice) -> ScaleReport:
    return ScaleReport(
        choice.input_exponent,
        choice.weight_exponent,
        float(choice.scale.min()),
        float(choice.scale.max()),
    )
