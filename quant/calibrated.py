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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from qserve.kernels.activations import round_activations
from qserve.quant.architecture import Stage
from qserve.quant.block_result import BlockResult
from qserve.quant.decoder import Block
from qserve.quant.drift import Lack, LackingInputs, LackingOutputs, aim_
from qserve.quant.folding import settle_
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.methods import Profile
from qserve.quant.plan import Plan
from qserve.quant.report import LayerReport, relative_error
from qserve.quant.scaling import ScaleChoice
from qserve.quant.seen import Seen, TokenCount, gram_of
from qserve.quant.stage_rounding import StageRounding
from qserve.quant.stage_scales import StageScales
from qserve.quant.steps import Rounding, Steps
from qserve.quant.walk import ScratchMemory, walk_

NUM_TRANSFORM_WINDOWS = 8
"""Windows, of those given, that choose the scales: two exponents need little data."""

MIN_TOKENS_PER_INPUT = 4
"""Calibration tokens for each input of a layer that error feedback needs: it uses all of the Gram
matrix, and with fewer tokens it would learn the text by heart. Range and scale need far less."""


@dataclass(frozen=True, slots=True)
class _Transformed:
    """A block whose scales are folded in.

    scales: of each stage that has one, as applied. left: hidden states of the transform windows
    behind the float block. energy: squared norm of what it has added to them.
    """

    scales: dict[str, ScaleChoice]
    left: torch.Tensor
    energy: float


class CalibratedQuantizer:
    """Quantizes the blocks of one model in their order.

    hidden: ``[num_windows, seq_len, hidden_size]``, what the first block receives; becomes what the
    quantized model has after the last one. exact: the same for the float model; None: it is not
    followed. counts: bool ``[num_windows, seq_len]``, the positions that decide anything; None for
    all of them.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        plan: Plan,
        profile: Profile,
        exact: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> None:
        self._hidden = hidden
        self._exact = exact
        self._plan = plan
        self._profile = profile
        self._counts = None if counts is None or bool(counts.all()) else counts
        self._num_tokens = hidden[..., 0].numel() if counts is None else int(counts.sum())
        self._scratch = ScratchMemory()
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
        for stage, windows in walk_(
            block, self._hidden, self._scratch, self._exact, MIN_TOKENS_PER_INPUT, self._counts
        ):
            spec = self._plan.spec(block, stage)
            if spec is None:
                continue
            count = TokenCount()
            gram = self._aim_(block, stage, count.of(self._as_multiplied(windows)))
            steps, choice = self._steps_for(len(gram)), transformed.scales.get(stage.name)
            found = StageRounding(spec, gram, steps, choice, count).run_(block, stage)
            del gram  # before there is another one
            weights |= found.codes
            layers += found.reports
        return BlockResult(weights, tuple(layers), self._block_error(transformed))

    def _aim_(self, block: Block, stage: Stage, windows: Iterator[Seen]) -> torch.Tensor:
        """Replace the weights of a stage by those that the codes are to stand for.

        Returns the Gram matrix of what the stage receives.
        """
        lack = self._lack(block, stage)
        gram = gram_of(block, stage, windows, lack)
        if lack is not None:
            aim_([block.linear(name).weight for name in stage.linears], gram, lack)
        return gram

    def _lack(self, block: Block, stage: Stage) -> Lack | None:
        """What will tell what the layers before a stage have lost, if it makes up for that."""
        first = block.linear(stage.linears[0])
        if self._exact is None or not self._steps_for(first.in_features).follow_float_model:
            return None
        if block.adds(stage):
            return LackingOutputs(first.weight)
        return LackingInputs(first.in_features)

    def _transform_(self, block: Block) -> _Transformed:
        """Choose and fold the scales of a float block."""
        left = self._hidden[:: self._stride].clone()
        entered = left.clone()
        scales = StageScales(self._plan, self._profile.steps.transform)
        counts = None if self._counts is None else self._counts[:: self._stride]
        found = scales.fold_(block, left, self._scratch, counts)
        return _Transformed(found, left, self._energy(left - entered))

    def _steps_for(self, num_inputs: int) -> Steps:
        """The steps that were asked for, unless there are too few tokens for error feedback."""
        steps = self._profile.steps
        enough = self._num_tokens >= MIN_TOKENS_PER_INPUT * num_inputs
        if enough or steps.rounding is not Rounding.FEEDBACK:
            return steps
        return replace(steps, rounding=Rounding.NEAREST)

    def _block_error(self, transformed: _Transformed) -> float:
        difference = self._hidden[:: self._stride] - transformed.left
        return relative_error(self._energy(difference), transformed.energy)

    def _energy(self, states: torch.Tensor) -> float:
        """The squared norm of the transform windows where they count."""
        if self._counts is not None:
            states = states[self._counts[:: self._stride]]
        return float(states.square().sum())

    def _as_multiplied(self, windows: Iterable[Seen]) -> Iterator[Seen]:
        """Windows with what the quantized model's layers multiply: rounded where they do that."""
        activations = self._profile.activations
        for seen in windows:
            if activations is None:
                yield seen
            else:
                yield replace(seen, received=round_activations(seen.received, activations))
