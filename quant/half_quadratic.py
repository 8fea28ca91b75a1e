"""Grids without calibration text, robust to the outliers of a group.

Spanning a group from its least to its greatest weight lets one outlier make all steps coarser. Here
the sum of ``|W - V|^p`` with p < 1 judges instead, under which many small errors cost more than a
few large ones. It is minimized by half-quadratic splitting (HQQ, Badri & Shaji 2023): an error E of
few large entries is taken off the weights by the proximal operator of the norm, and what is left,
``W - E``, is fitted in least squares. There the zero point alone is fitted and stays a fraction.
Zero points that engines read are whole numbers, which barely move, so the scale is fitted too, and
the iteration starts from several shares of the full range.
"""

from __future__ import annotations

import torch

from qserve.quant.grid import MIN_SCALE, Grid, LevelSet, nearest_levels

POWER = 0.7
FIRST_BETA, BETA_GROWTH = 10.0, 1.2
"""Weight of the quadratic term that ties E to the error, and its growth from step to step. Errors
are measured in steps of the grid, so that one value suits every layer."""

NUM_ITERATIONS = 8
SHARES = (1.0, 0.9, 0.8, 0.7)
"""Shares of the full range to start from."""


def solve_grid(weights: torch.Tensor, levels: LevelSet) -> Grid:
    """The best grid found for each group of ``weights [..., group_size]``; integer levels only."""
    low, high = weights.amin(-1), weights.amax(-1)
    best = levels.span(low, high)
    least = _cost(weights, best)
    for share in SHARES:
        grid = levels.span(low * share, high * share)
        beta = FIRST_BETA
        for _ in range(NUM_ITERATIONS):
            cost = _cost(weights, grid)
            better = cost < least
            least = torch.where(better, cost, least)
            best = Grid(
                torch.where(better, grid.scales, best.scales),
                torch.where(better, grid.zero_points, best.zero_points),
                levels,
            )
            grid = _improve(weights, grid, beta)
            beta *= BETA_GROWTH
    return best


def _cost(weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The sum of ``|W - V|^p`` of each group."""
    values = nearest_levels(weights, grid).mul_(grid.scales[..., None])
    return values.sub_(weights).abs_().pow_(POWER).sum(-1)


def _improve(weights: torch.Tensor, grid: Grid, beta: float) -> Grid:
    """One round: the error is split in two, zero point and scale are fitted to what is left."""
    scales = grid.scales[..., None]
    units = weights / scales
    found = grid.snap_(units.clone())
    error = units - found
    size = error.abs()
    large = (size - size.clamp(min=1e-6).pow(POWER - 1) / beta).clamp_(min=0).copysign(error)
    target = units - large
    zero_points = grid.zero_points + (found - target).mean(-1)
    zero_points = zero_points.round_().clamp_(0, (1 << grid.levels.bits) - 1)
    moved = found + (grid.zero_points - zero_points)[..., None]
    energy = moved.square().sum(-1)
    factor = (target * moved).sum(-1) / energy.clamp(min=1)
    fitted = (grid.scales * factor).clamp(min=MIN_SCALE)
    fitted = torch.where(energy > 0, fitted, grid.scales)
    return Grid(grid.levels.stored(fitted), zero_points, grid.levels)
