"""Weights to aim at that make up for what the quantized layers before have lost.

When the turn of a linear layer W comes, it receives X where the float model has F, and what its
output is added to is R where the float model has S. The output that would put that right is
``F W^T + (S - R)``; the weights that come nearest to it from the inputs there are

    ``T = W + (W (F - X)^T X + (S - R)^T X) (X^T X)^-1``.

Half of the way from W to T is gone, with a damped inverse: T fits the calibration text, and what is
learned from few tokens must not be followed to the end.
(Asymmetric calibration: Li et al. 2025, arXiv 2504.02692; the share: Arai and Ichikawa 2025, arXiv
2504.09629; the hidden states S - R besides the inputs are our addition.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from qserve.quant.rounding import damped
from qserve.quant.stacked_rows import Piece, pieces_of

SHARE = 0.5
"""Share of the way from W to T."""

DAMPING = 0.1
"""Share of the mean diagonal added to the Gram matrix before it is inverted."""

HiddenPair = tuple[torch.Tensor, torch.Tensor]
"""What an output is added to as it is, rows of R and of S, ``[T, N]``."""


class Lack(Protocol):
    """What a stage lacks because of the layers before it, added up over windows."""

    def add(self, received: torch.Tensor, exact: torch.Tensor, hidden: HiddenPair | None) -> None:
        """Add rows ``[T, K]`` of the inputs X and F."""

    def settle_(self) -> None:
        """Turn sums into means; nothing can be added afterwards."""

    def of(self, piece: Piece) -> torch.Tensor:
        """``(W (F - X)^T + (S - R)^T) X / T`` for some rows of W."""


class LackingInputs:
    """For a stage whose outputs go into other layers: S - R is not there."""

    def __init__(self, num_inputs: int) -> None:
        self._moment = torch.zeros(num_inputs, num_inputs)  # (F - X)^T X
        self._num_rows = 0

    def add(self, received: torch.Tensor, exact: torch.Tensor, hidden: HiddenPair | None) -> None:
        """See ``Lack``."""
        self._moment.addmm_((exact - received).T, received)
        self._num_rows += len(received)

    def settle_(self) -> None:
        """See ``Lack``."""
        self._moment.div_(max(self._num_rows, 1))

    def of(self, piece: Piece) -> torch.Tensor:
        """See ``Lack``."""
        return piece.read() @ self._moment


class LackingOutputs:
    """For a layer ``weight [N, K]`` whose outputs are added to the hidden states."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._moment = torch.zeros_like(weight)
        self._num_rows = 0

    def add(self, received: torch.Tensor, exact: torch.Tensor, hidden: HiddenPair | None) -> None:
        """See ``Lack``."""
        assert hidden is not None
        there, wanted = hidden
        outputs = torch.addmm(wanted - there, exact - received, self._weight.T)
        self._moment.addmm_(outputs.T, received)
        self._num_rows += len(received)

    def settle_(self) -> None:
        """See ``Lack``."""
        self._moment.div_(max(self._num_rows, 1))

    def of(self, piece: Piece) -> torch.Tensor:
        """See ``Lack``."""
        return self._moment[piece.rows]


def aim_(weights: Sequence[torch.Tensor], gram: torch.Tensor, lack: Lack) -> None:
    """Replace the weights ``[N, K]`` of the layers of a stage by those to quantize instead.

    gram: of the inputs X, ``[K, K]``.
    """
    lack.settle_()
    factor = torch.linalg.cholesky(damped(gram, DAMPING))
    for piece in pieces_of(weights):
        change = torch.cholesky_solve(lack.of(piece).T, factor).T
        piece.write_(torch.add(piece.read(), change, alpha=SHARE))
