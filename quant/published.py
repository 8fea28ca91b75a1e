"""The methods as they were published and as other tools run them: what ``Effort.PLAIN`` takes.

To compare with: each of these steps has a counterpart that loses less.
"""

from __future__ import annotations

import torch

from qserve.quant.grid import Grid, LevelSet, Rounded, grid_over_all, rounding_difference
from qserve.quant.objective import diagonal_blocks
from qserve.quant.scaling import ScaleChoice, ScaledStage, scale_from_logs

NUM_EXPONENTS = 20
"""Of the magnitude of the inputs, from 0 to 0.95 (AWQ, Lin et al. 2023, section 3.2)."""

NUM_SHRINKS = 10
SHRINK_STEP = 0.05
"""Ranges tried: both ends at once, down to just over a half (AWQ's published code)."""

COLUMNS_AT_ONCE = 128
"""Of a row that is one group."""


class PublishedScaleSearch:
    """AWQ's search for the scale of one stage: ``s = mean|x|^a`` with one exponent.

    inputs: what the stage receives, ``[..., K]``.
    """

    def __init__(self, stage: ScaledStage, inputs: torch.Tensor) -> None:
        self._stage = stage
        floor = torch.finfo(torch.float32).tiny
        self._log_inputs = inputs.flatten(0, -2).abs().mean(0).clamp(min=floor).log()

    def run(self) -> ScaleChoice:
        """The best candidate; no scaling is the first of them."""
        exponents = [i / NUM_EXPONENTS for i in range(NUM_EXPONENTS)]
        scales = [scale_from_logs(a * self._log_inputs, self._stage.sharing) for a in exponents]
        errors = self._stage.errors(scales)
        best = min(range(NUM_EXPONENTS), key=errors.__getitem__)
        return ScaleChoice(scales[best], exponents[best], 0.0, errors[best], errors[0])


def shrink_grid(
    weight: torch.Tensor, gram: torch.Tensor, group_size: int, levels: LevelSet
) -> Grid:
    """AWQ's range step: the grid ``[N, G]`` whose two ends are drawn in by the same share.

    weight: ``[N, K]``. gram: ``[K, K]``; each group is judged by its own block.
    """
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    blocks = diagonal_blocks(gram, group_size)
    best = levels.span(low, high)
    least = torch.full_like(low, torch.inf)
    for step in range(NUM_SHRINKS):
        share = 1 - SHRINK_STEP * step
        grid = levels.span(low * share, high * share)
        difference = rounding_difference(groups, grid)
        error = torch.einsum("ngi,gij,ngj->ng", difference, blocks, difference)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales),
            torch.where(better, grid.zero_points, best.zero_points),
            levels,
        )
    return best


def round_columns(
    weight: torch.Tensor, factor: torch.Tensor, group_size: int, levels: LevelSet
) -> Rounded:
    """GPTQ (Frantar et al. 2022, algorithm 1): columns in turn, errors taken up by the later ones.

    The grid of a group spans what its weights have become when the first of them is reached.
    factor: U with ``U^T U = H^-1``, ``[K, K]``, of the damped Gram matrix H.
    """
    remaining = weight.T.clone()  # a column of the weight is a row here
    found = torch.empty_like(remaining)
    num_inputs = len(remaining)
    step = COLUMNS_AT_ONCE if group_size == num_inputs else group_size
    grids: list[Grid] = []
    for start in range(0, num_inputs, step):
        end = min(start + step, num_inputs)
        if start % group_size == 0:
            grids.append(grid_over_all(remaining[start : start + group_size].T, levels))
        grid = grids[-1]
        errors = torch.empty(end - start, len(weight))
        for i in range(start, end):
            level = grid.snap_((remaining[i] / grid.scales)[:, None])[:, 0]
            found[i] = level
            errors[i - start] = (remaining[i] - level * grid.scales) / factor[i, i]
            remaining[i + 1 : end].addcmul_(
                factor[i, i + 1 : end, None], errors[i - start], value=-1
            )
        remaining[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    scales = torch.stack([grid.scales for grid in grids], dim=1)
    zero_points = torch.stack([grid.zero_points for grid in grids], dim=1)
    return Rounded(found.T.unflatten(1, (-1, group_size)), Grid(scales, zero_points, levels))
