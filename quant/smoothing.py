"""The transform step when activations are rounded too: who carries the outliers, inputs or weights.

Inputs divided by ``s`` and weights times ``s`` compute the same function. Activations in int8 have
one scale a token, so an input that is large for every token costs all the others their precision;
moved into the weights it costs them theirs (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438, there
``s = max|x|^a / max|w|^(1 - a)`` with a fixed). Here

    ``s = max|x|^a / max|w|^b``

with both exponents searched on what the rounded layer computes from a sample of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qserve.kernels.activations import Activations, round_activations
from qserve.quant.grid import LevelSet, grid_over_all, rounding_difference
from qserve.quant.scaling import HeadSharing, ScaleChoice, scale_from_logs

INPUT_EXPONENTS = tuple(i / 10 for i in range(11))
WEIGHT_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
PUBLISHED_EXPONENTS = (0.5, 0.5)

NUM_ROWS, LEAST_ROWS = 256, 16
"""Evenly spread outputs that judge a candidate, in all and of each part."""


@dataclass(frozen=True, slots=True)
class SmoothPart:
    """Linear layers that read the same rows, among those that a scale is for.

    weight: ``[N, K]``, the layers one after the other. inputs: a sample of what they receive,
    ``[T, K]``.
    """

    weight: torch.Tensor
    inputs: torch.Tensor

    def thinned(self, num_rows: int) -> SmoothPart:
        """With evenly spread outputs, so many at most."""
        return SmoothPart(self.weight[:: -(-len(self.weight) // num_rows)], self.inputs)


class SmoothSearch:
    """Finds the scale of one stage, of one part or more."""

    def __init__(
        self,
        parts: Sequence[SmoothPart],
        group_size: int,
        levels: LevelSet,
        sharing: HeadSharing | None,
    ) -> None:
        num_rows = max(NUM_ROWS // len(parts), LEAST_ROWS)
        self._parts = [part.thinned(num_rows) for part in parts]
        self._expected = [part.inputs @ part.weight.T for part in self._parts]
        self._group_size = group_size
        self._levels = levels
        self._sharing = sharing
        self._log_inputs = _log_largest([part.inputs for part in parts])
        self._log_weights = _log_largest([part.weight for part in parts])

    def run(self) -> ScaleChoice:
        """The best candidate, or no scaling."""
        points = [(a, b) for b in WEIGHT_EXPONENTS for a in INPUT_EXPONENTS]
        errors = {point: self._error(self.scale_at(*point)) for point in points}
        best = min(errors, key=errors.__getitem__)  # the first of equals: no scaling
        return ScaleChoice(self.scale_at(*best), *best, errors[best], errors[points[0]])

    def published(self) -> ScaleChoice:
        """The exponents that SmoothQuant fixes, whatever they do here."""
        scale = self.scale_at(*PUBLISHED_EXPONENTS)
        unscaled = self._error(torch.ones_like(scale))
        return ScaleChoice(scale, *PUBLISHED_EXPONENTS, self._error(scale), unscaled)

    def scale_at(self, input_exponent: float, weight_exponent: float) -> torch.Tensor:
        """``max|x|^a / max|w|^b``, shared where it must be."""
        logs = input_exponent * self._log_inputs - weight_exponent * self._log_weights
        return scale_from_logs(logs, self._sharing)

    def _error(self, scale: torch.Tensor) -> float:
        total = 0.0
        for part, expected in zip(self._parts, self._expected, strict=True):
            rows = part.weight * scale
            groups = rows.unflatten(1, (-1, self._group_size))
            grid = grid_over_all(groups, self._levels).settled()
            rounded = rows + rounding_difference(groups, grid).flatten(1)
            found = round_activations(part.inputs / scale, Activations.INT8_TOKEN) @ rounded.T
            total += float((found - expected).square().sum())
        return total


def _log_largest(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the largest magnitude in each column."""
    largest = torch.stack([matrix.abs().amax(0) for matrix in matrices]).amax(0)
    return largest.clamp(min=torch.finfo(torch.float32).tiny).log()
