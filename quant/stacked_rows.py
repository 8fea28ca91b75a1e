"""The weights of several linear layers one above the other, some rows at a time.

Rows are quantized independently of each other, so that what a step needs beside the weights
themselves does not grow with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from qserve.quant.objective import ROWS_AT_ONCE

NUMBERS_AT_ONCE = 1 << 21
"""Of a piece, 8 MiB; the steps that choose its codes take some eight times that."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a stack.

    rows: which they are in the stack. layers: the indices of the layers they are of. parts: views
    of the weights of these, ``[n, K]``.
    """

    rows: slice
    layers: tuple[int, ...]
    parts: tuple[torch.Tensor, ...]

    @property
    def sizes(self) -> list[int]:
        """The number of rows in each part."""
        return [len(part) for part in self.parts]

    def read(self) -> torch.Tensor:
        """The rows, ``[n, K]``; a view of the weight where they are all of one."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def write_(self, values: torch.Tensor) -> None:
        """Replace the rows by ``values [n, K]``."""
        for part, new in zip(self.parts, values.split(self.sizes), strict=True):
            part.copy_(new)


def pieces_of(weights: Sequence[torch.Tensor], whole: bool = False) -> Iterator[Piece]:
    """The weights ``[N, K]`` in pieces. whole: each layer is a piece, however large."""
    ends = list(accumulate(map(len, weights)))
    num_inputs = weights[0].shape[1]
    step = max(1, NUMBERS_AT_ONCE // num_inputs // ROWS_AT_ONCE) * ROWS_AT_ONCE
    starts: Sequence[int] = [0, *ends[:-1]] if whole else range(0, ends[-1], step)
    for start, end in zip(starts, [*starts[1:], ends[-1]], strict=True):
        inside = [
            (index, weight[max(start - first, 0) : end - first])
            for index, (weight, first) in enumerate(zip(weights, [0, *ends], strict=False))
            if first < end and start < first + len(weight)
        ]
        layers, parts = zip(*inside, strict=True)
        yield Piece(slice(start, end), layers, parts)
