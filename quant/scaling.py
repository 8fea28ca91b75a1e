"""The transform step: scales on the inputs of a stage that make its weights easier to round.

Weights times ``s`` and inputs divided by ``s`` compute the same function; but inputs that matter
then take more of the range of their group (AWQ, Lin et al. 2023, section 3.2: there
``s = mean|x|^a``, in the published code also ``mean|x|^a / mean|w|^(1 - a)``). Here

    ``s = rms(x)^a / rms(w)^b``

with both exponents searched: rms(x) is on the diagonal of the Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qserve.quant.grid import LevelSet, grid_over_all, rounding_difference
from qserve.quant.objective import ROWS_AT_ONCE, output_errors

INPUT_EXPONENTS = tuple(i / 20 for i in range(21))
WEIGHT_EXPONENTS = (0.0, 0.5, 1.0)
"""Together 63 candidates, no scaling among them; the published code tries 20."""

NUM_SCREENED_ROWS = 128
NUM_FINALISTS = 4
"""A scale is shared by all rows of a weight, so evenly spread rows screen the candidates; the best
few, and no scaling, are then judged on all rows. On the demo model's layers this ends 0.3 % above
the error of judging every candidate on all rows, in an eighth of the time."""

MAX_LOG_SCALE = math.log(1024)

Point = tuple[float, float]
"""The exponents of the inputs and of the weights."""


@dataclass(frozen=True, slots=True)
class HeadSharing:
    """Inputs that must have one scale because one row before the stage makes them all.

    In grouped-query attention, row ``h * head_dim + d`` of the value projection feeds the inputs
    ``(h * repeats + r) * head_dim + d`` of the output projection for every ``r < repeats``.
    """

    head_dim: int
    repeats: int

    def share(self, values: torch.Tensor) -> torch.Tensor:
        """``[K]`` with every shared set replaced by its mean."""
        sets = values.view(-1, self.repeats, self.head_dim)
        return sets.mean(1, keepdim=True).expand_as(sets).reshape(-1)

    def of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """One value for each row before the stage, ``[K / repeats]``, of shared ``values [K]``."""
        return values.view(-1, self.repeats, self.head_dim)[:, 0].reshape(-1)


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """The scale of a stage and how it was found.

    scale: float32 ``[K]``; all ones when nothing was better than no scaling.
    error, unscaled_error: output errors of rounding to nearest, with the scale and without.
    """

    scale: torch.Tensor
    input_exponent: float
    weight_exponent: float
    error: float
    unscaled_error: float


@dataclass(frozen=True, slots=True)
class ScaledPart:
    """Linear layers that read the same rows, among those that a scale is for.

    weights: ``[N, K]`` of each. gram: gives the Gram matrix ``[K, K]`` of their inputs, which is
    held while it is used. share: of the tokens, how many come here.
    """

    weights: Sequence[torch.Tensor]
    gram: Callable[[], torch.Tensor]
    group_size: int
    levels: LevelSet
    share: float = 1.0

    def error(self, scale: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
        """Output error of rounding ``weight * scale`` to nearest, inputs divided by ``scale``."""
        total = 0.0
        for some in weight.split(ROWS_AT_ONCE):
            groups = (some * scale).unflatten(1, (-1, self.group_size))
            difference = rounding_difference(groups, grid_over_all(groups, self.levels))
            total += float(output_errors(difference.flatten(1).div_(scale), gram).sum())
        return self.share * total


@dataclass(frozen=True, slots=True)
class ScaledStage:
    """What one scale is judged by: the sum of the output errors of its parts.

    sharing: the inputs that must have one scale; None: all are free.
    """

    parts: Sequence[ScaledPart]
    sharing: HeadSharing | None

    @property
    def num_rows(self) -> int:
        """Outputs of all layers."""
        return sum(len(weight) for part in self.parts for weight in part.weights)

    def errors(self, scales: Sequence[torch.Tensor], stride: int = 1) -> list[float]:
        """The output error with each of some scales, by every so many of the outputs."""
        totals = [0.0] * len(scales)
        for part in self.parts:
            gram, weight = part.gram(), torch.cat(list(part.weights))[::stride]
            for i, scale in enumerate(scales):
                totals[i] += part.error(scale, weight, gram)
        return totals


class ScaleSearch:
    """Finds the scale of one stage."""

    def __init__(self, stage: ScaledStage) -> None:
        self._stage = stage
        energy, weight = torch.zeros(()), torch.zeros(())
        for part in stage.parts:
            energy = energy + part.share * part.gram().diagonal()
            weight = weight + sum(one.square().sum(0) for one in part.weights)
        # Inputs whose weights are all zero, or that never fire, must not reach the logarithm.
        self._log_inputs = _log_rms(energy)
        self._log_weights = _log_rms(weight / stage.num_rows)

    def run(self) -> ScaleChoice:
        """The best candidate, or no scaling."""
        none, *points = [(a, b) for b in WEIGHT_EXPONENTS for a in INPUT_EXPONENTS]
        stride = -(-self._stage.num_rows // NUM_SCREENED_ROWS)
        screened = self._errors(points, stride)
        finalists = sorted(points, key=screened.__getitem__)[:NUM_FINALISTS]
        errors = self._errors([none, *finalists])
        best = min(errors, key=errors.__getitem__)  # the first of equals: no scaling
        return ScaleChoice(self.scale_at(*best), *best, errors[best], errors[none])

    def _errors(self, points: Sequence[Point], stride: int = 1) -> dict[Point, float]:
        scales = [self.scale_at(*point) for point in points]
        return dict(zip(points, self._stage.errors(scales, stride), strict=True))

    def scale_at(self, input_exponent: float, weight_exponent: float) -> torch.Tensor:
        """``rms(x)^a / rms(w)^b``, shared where it must be, its extremes centred around one."""
        logs = input_exponent * self._log_inputs - weight_exponent * self._log_weights
        return scale_from_logs(logs, self._stage.sharing)


def scale_from_logs(log_scale: torch.Tensor, sharing: HeadSharing | None) -> torch.Tensor:
    """The scale ``[K]`` with these logarithms, shared where it must be, its extremes centred around
    one."""
    if sharing is not None:
        log_scale = sharing.share(log_scale)
    log_scale = log_scale - (log_scale.max() + log_scale.min()) / 2
    return log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()


def _log_rms(mean_squares: torch.Tensor) -> torch.Tensor:
    floor = mean_squares.max().clamp(min=torch.finfo(torch.float32).tiny) * 1e-12
    return mean_squares.clamp(min=float(floor)).log() / 2
