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

from collections.abc import Iterable
from dataclasses import dataclass

import torch

SHARE = 0.5
"""Share of the way from W to T."""

DAMPING = 0.1
"""Share of the mean diagonal added to the Gram matrix before it is inverted."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Where the quantized model has got to at a stage, and where the float one is.

    received, exact: windows ``[T, K]`` of inputs X and F, in the same order. hidden: for an output
    that is added to the hidden states as it is, windows ``[T, N]`` of R and of S; else None.
    """

    received: Iterable[torch.Tensor]
    exact: Iterable[torch.Tensor]
    hidden: tuple[torch.Tensor, torch.Tensor] | None


def aim(weight: torch.Tensor, gram: torch.Tensor, drift: Drift) -> torch.Tensor:
    """The weights ``[N, K]`` to quantize instead of ``weight``.

    gram: of the inputs X, ``[K, K]``.
    """
    lacking = _lacking_outputs if drift.hidden is not None else _lacking_inputs
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean())
    factor = torch.linalg.cholesky(damped)
    change = torch.cholesky_solve(lacking(weight, drift).T, factor).T
    return torch.add(weight, change, alpha=SHARE)


def _lacking_inputs(weight: torch.Tensor, drift: Drift) -> torch.Tensor:
    """``W (F - X)^T X / T``, ``[N, K]``."""
    moment = weight.new_zeros(weight.shape[1], weight.shape[1])
    num_rows = 0
    for received, exact in zip(drift.received, drift.exact, strict=True):
        moment.addmm_((exact - received).T, received)
        num_rows += len(received)
    return weight @ moment.div_(max(num_rows, 1))


def _lacking_outputs(weight: torch.Tensor, drift: Drift) -> torch.Tensor:
    """``(W (F - X)^T + (S - R)^T) X / T``, ``[N, K]``."""
    assert drift.hidden is not None
    moment = torch.zeros_like(weight)
    num_rows = 0
    for received, exact, hidden, wanted in zip(
        drift.received, drift.exact, *drift.hidden, strict=True
    ):
        outputs = torch.addmm(wanted - hidden, exact - received, weight.T)
        moment.addmm_(outputs.T, received)
        num_rows += len(received)
    return moment.div_(max(num_rows, 1))
