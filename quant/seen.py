"""What is seen of the inputs of a stage, and their Gram matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from qserve.quant.architecture import Stage
from qserve.quant.decoder import Block
from qserve.quant.drift import Lack
from qserve.quant.errors import CheckpointError
from qserve.quant.objective import GramMatrix


@dataclass(frozen=True, slots=True)
class Seen:
    """One window at a stage; of an expert, some of the tokens that it is shown.

    index: of the window. received: ``[T, K]``, what the layers of the stage read. exact: what they
    read in the float model; None without one. hidden: for a stage whose output is added to the
    hidden states as it is, these before that, ``[T, N]``, of the quantized and of the float model;
    else None. num_borrowed: rows that do not go to these layers, but come near to it.
    """

    index: int
    received: torch.Tensor
    exact: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, torch.Tensor] | None = None
    num_borrowed: int = 0

    def at(self, positions: torch.Tensor) -> Seen:
        """Some positions of a window, bool ``[T]``, as if there were no others."""
        exact = None if self.exact is None else self.exact[positions]
        pair = self.hidden
        if pair is not None:
            pair = pair[0][positions], pair[1][positions]
        return Seen(self.index, self.received[positions], exact, pair)


class TokenCount:
    """Counts the rows that pass."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_borrowed = 0

    def of(self, windows: Iterable[Seen]) -> Iterator[Seen]:
        """The windows, which are counted as they are looked at."""
        for seen in windows:
            self.num_tokens += len(seen.received)
            self.num_borrowed += seen.num_borrowed
            yield seen


def gram_of(
    block: Block, stage: Stage, windows: Iterable[Seen], lack: Lack | None = None
) -> torch.Tensor:
    """The Gram matrix of what a stage receives; ``lack`` is given the same windows.

    Raises ``CheckpointError`` when something is infinite or NaN.
    """
    gram = GramMatrix(block.linear(stage.linears[0]).in_features)
    for seen in windows:
        gram.add(seen.received)
        if lack is not None and seen.exact is not None:
            lack.add(seen.received, seen.exact, seen.hidden)
    mean = gram.mean()
    if not bool(torch.isfinite(mean).all()):
        raise CheckpointError(
            f"{block.full_name(stage.linears[0])} receives infinite or NaN inputs: the model "
            "overflows on the calibration text, its weights are damaged"
        )
    return mean
