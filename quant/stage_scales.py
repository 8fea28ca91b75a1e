"""The scales of a block: found by what each stage receives in the float model, and folded in.

Stages behind one norm (the experts of a mixture) share a scale, which is judged by the sum of their
errors; routers read what it divides and are multiplied by it, but have no say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qserve.quant.architecture import Fold, Stage
from qserve.quant.decoder import Block
from qserve.quant.folding import fold_, sharing_of
from qserve.quant.plan import Plan
from qserve.quant.published import PublishedScaleSearch
from qserve.quant.scaling import HeadSharing, ScaleChoice, ScaledPart, ScaledStage, ScaleSearch
from qserve.quant.seen import Seen, gram_of
from qserve.quant.smoothing import SmoothPart, SmoothSearch
from qserve.quant.steps import Transform
from qserve.quant.target import StageSpec
from qserve.quant.walk import ScratchMemory, walk_

NUM_SMOOTHING_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class _Received:
    """What a stage has received: its inputs ``[T, K]``, or their Gram matrix alone."""

    block: Block
    stage: Stage
    spec: StageSpec
    inputs: torch.Tensor | None
    gram: torch.Tensor | None = None

    @property
    def weights(self) -> list[torch.Tensor]:
        return [self.block.linear(name).weight for name in self.stage.linears]

    @property
    def group_size(self) -> int:
        return self.spec.width(self.weights[0].shape[1])

    @property
    def rows(self) -> torch.Tensor:
        assert self.inputs is not None
        return self.inputs

    def find_gram(self) -> torch.Tensor:
        """The Gram matrix of the inputs."""
        if self.gram is not None:
            return self.gram
        return gram_of(self.block, self.stage, [Seen(0, self.rows)])


@dataclass(frozen=True, slots=True)
class StageScales:
    """Finds the scales of blocks by one kind of transform."""

    plan: Plan
    transform: Transform

    def fold_(
        self,
        block: Block,
        hidden: torch.Tensor,
        scratch: ScratchMemory,
        counts: torch.Tensor | None = None,
    ) -> dict[str, ScaleChoice]:
        """Choose the scales of a float block and fold them in: of each stage that has one.

        hidden: windows ``[S, T, hidden_size]``, which become what leaves the block. counts: bool
        ``[S, T]``, the positions that choose; None for all of them.
        """
        found: dict[str, ScaleChoice | None] = {}
        held: list[_Received] = []
        for stage, windows in walk_(block, hidden, scratch, counts=counts):
            readers = [one for one in block.readers(stage) if self.plan.spec(block, one)]
            if self.transform is Transform.NONE or stage not in readers:
                continue
            mine = self._look(block, stage, windows, is_alone=len(readers) == 1)
            if len(readers) > 1:
                held.append(mine)
            parts = held if len(readers) > 1 else [mine]
            if len(parts) == len(readers):
                found |= dict.fromkeys([one.name for one in readers], self._choose(parts))
                parts.clear()
        scales: dict[str, ScaleChoice] = {}
        for stage in block.stages:
            choice = found.get(stage.name)
            if choice is not None and stage.name not in scales:
                applied = replace(choice, scale=fold_(block, stage, choice.scale))
                readers = [one for one in block.readers(stage) if one.name in found]
                scales |= dict.fromkeys([one.name for one in readers], applied)
        return scales

    def _look(
        self, block: Block, stage: Stage, windows: Iterator[Seen], is_alone: bool
    ) -> _Received:
        """Keep of a stage what its scale will be chosen by."""
        spec = self.plan.spec(block, stage)
        assert spec is not None
        if is_alone and self.transform is Transform.SCALE:
            return _Received(block, stage, spec, None, gram_of(block, stage, windows))
        return _Received(block, stage, spec, torch.cat([seen.received for seen in windows]))

    def _choose(self, parts: list[_Received]) -> ScaleChoice | None:
        """The scale that stages have in common; None where they get none."""
        first = parts[0]
        sharing = sharing_of(first.block, first.stage)
        if self.transform is Transform.SCALE:
            return ScaleSearch(_scaled(parts, sharing)).run()
        if self.transform is Transform.PUBLISHED_SCALE:
            if sharing is not None and sharing.repeats > 1:
                return None  # published for query heads that have key/value heads of their own
            inputs = torch.cat([part.rows for part in parts])
            return PublishedScaleSearch(_scaled(parts, sharing), inputs).run()
        stride = -(-sum(len(part.rows) for part in parts) // NUM_SMOOTHING_TOKENS)
        samples = [
            SmoothPart(torch.cat(part.weights), part.rows[::stride])
            for part in parts
            if len(part.rows)
        ]
        smoothing = SmoothSearch(samples, first.group_size, first.spec.levels, sharing)
        if self.transform is Transform.SMOOTH:
            return smoothing.run()
        return smoothing.published() if first.stage.fold is Fold.NORM else None


def _scaled(parts: list[_Received], sharing: HeadSharing | None) -> ScaledStage:
    """What a scale of some stages is judged by: each by the share of rows that come to it."""
    total = sum(len(part.rows) for part in parts) if len(parts) > 1 else 1
    return ScaledStage(
        [
            ScaledPart(
                part.weights,
                part.find_gram,
                part.group_size,
                part.spec.levels,
                len(part.rows) / total if len(parts) > 1 else 1.0,
            )
            for part in parts
        ],
        sharing,
    )
