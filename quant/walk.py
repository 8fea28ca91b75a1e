"""One block, stage by stage: what its linear layers receive, window by window.

The float model may be walked beside the quantized one. Memory is one buffer as wide as the inputs
of the output layer of attention or of the MLP, whichever is wider, for both models: it holds what
the float model gives that layer, and as each window of the quantized model is made, that takes the
place of the float one, which has been used by then. Everything else is made again for each window.
Experts need more, see ``expert_walk.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qserve.quant.allocation import return_freed
from qserve.quant.architecture import Stage
from qserve.quant.decoder import Block
from qserve.quant.expert_walk import ExpertWalk
from qserve.quant.seen import Seen


class ScratchMemory:
    """Float32 memory that is reused: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, *shape: int) -> torch.Tensor:
        """An uninitialised tensor, in the memory of what was taken before."""
        size = torch.Size(shape).numel()
        if self._memory.numel() < size:
            self._memory = torch.empty(0)  # freed before there is more
            self._memory = torch.empty(size)
        return self._memory[:size].view(shape)


def walk_(
    block: Block,
    hidden: torch.Tensor,
    scratch: ScratchMemory,
    exact: torch.Tensor | None = None,
    least_per_input: int = 0,
    counts: torch.Tensor | None = None,
) -> Iterator[tuple[Stage, Iterator[Seen]]]:
    """Each stage with its windows, in order of execution.

    hidden, exact: ``[S, T, hidden_size]``, what enters the block in the quantized model and in the
    float one; at the end they are what leaves it. The caller may replace the weights of a stage
    when it has seen all of its windows, and the quantized model goes on with the new ones; the
    float model runs on the weights that it finds when the windows are seen, without rounded
    activations. What was shown is overwritten when the next window is asked for.
    least_per_input: tokens for each input of its layers that an expert is shown, see ``Seen``.
    counts: bool ``[S, T]``, the positions that are shown; None for all of them.
    """
    has_experts = block.mixture is not None
    stages = block.stages[: 2 if has_experts else None]
    for first, output in zip(stages[::2], stages[1::2], strict=True):
        kept = scratch.take(*hidden.shape[:2], block.linear(output.linears[0]).in_features)
        half = _Half(block, first, output, hidden, exact, kept)
        for stage, windows in ((first, half.see_normed()), (output, half.see_mixed())):
            return_freed()
            yield stage, _counting(windows, counts)
            for _ in windows:
                pass  # what the caller did not look at is computed all the same
        for window, inputs in zip(hidden, kept, strict=True):
            block.add_(output, window, inputs)
    if has_experts:
        memory = scratch.take(ExpertWalk.numbers_needed(block, hidden, exact))
        shown = torch.ones(hidden.shape[:2], dtype=torch.bool) if counts is None else counts
        yield from ExpertWalk(block, hidden, exact, memory, shown).stages_(least_per_input)


def _counting(windows: Iterator[Seen], counts: torch.Tensor | None) -> Iterator[Seen]:
    for seen in windows:
        yield seen if counts is None else seen.at(counts[seen.index])


@dataclass(frozen=True, slots=True)
class _Half:
    """Attention or MLP: the stage behind the norm, and the one whose output is added."""

    block: Block
    first: Stage
    output: Stage
    hidden: torch.Tensor
    exact: torch.Tensor | None
    kept: torch.Tensor

    def see_normed(self) -> Iterator[Seen]:
        """The windows behind the norm; ``kept`` becomes what the float model makes of them."""
        norm = self.block.module(self.first.previous)
        for index, window in enumerate(self.hidden):
            if self.exact is None:
                yield Seen(index, norm(window))
                continue
            beside = norm(self.exact[index])
            yield Seen(index, norm(window), beside)
            with self.block.unrounded():
                self.kept[index].copy_(self.block.mix(self.output, beside))

    def see_mixed(self) -> Iterator[Seen]:
        """The windows before the output layer, which ``kept`` becomes; ``exact`` goes on."""
        norm = self.block.module(self.first.previous)
        for index, window in enumerate(self.hidden):
            received, kept = self.block.mix(self.output, norm(window)), self.kept[index]
            if self.exact is not None:
                pair = (window, self.exact[index]) if self.block.adds(self.output) else None
                yield Seen(index, received, kept, pair)
                with self.block.unrounded():
                    self.block.add_(self.output, self.exact[index], kept)
            kept.copy_(received)
            if self.exact is None:
                yield Seen(index, kept)
