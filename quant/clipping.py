"""The range step: how far the grid of each group reaches, judged by the Gram matrix of its inputs.

A narrower range rounds most weights better and a few large ones worse. Both ends are searched.
"""

from __future__ import annotations

import torch

from qserve.quant.grid import Grid, grid_over, rounding_difference
from qserve.quant.objective import diagonal_blocks

BOTH_ENDS = tuple(1 - i / 20 for i in range(-1, 11) if i)
"""Shares of the full range tried on both ends at once. Wider than full is tried too: where the 16
values of the grid fall between the extremes matters as much as how far they reach."""

ONE_END = (0.875, 0.75, 0.625, 0.5)
"""Shares tried on one end with the other at its extreme, for groups with an outlier on one side."""

REFINEMENTS = (1 / 8, 1 / 16, 1 / 32, 1 / 64)
"""Steps tried on one end at a time, from each group's best so far, in both directions.

On the demo model's layers, the error relative to the full range: 0.76 for 16 steps on both ends at
once, down to a half (as the published code searches), 0.64 for these tables, 36 candidates.
"""

MAX_REACH = 1.25
"""How far beyond an extreme the grid may reach."""


def search_grid(weight: torch.Tensor, gram: torch.Tensor, group_size: int, bits: int) -> Grid:
    """The grid ``[N, G]`` for which rounding to nearest has the least error, group by group.

    weight: ``[N, K]``. gram: ``[K, K]``; only the block of each group counts, so the groups of a
    row do not see each other. The full range is a candidate: no group ends worse than with it.
    """
    blocks = diagonal_blocks(gram, group_size)
    groups = weight.unflatten(1, (-1, group_size))
    scales = torch.empty(groups.shape[:2])
    zero_points = torch.empty(groups.shape[:2])
    for index, block in enumerate(blocks):
        grid = _search_group(groups[:, index].contiguous(), block, bits)
        scales[:, index], zero_points[:, index] = grid.scales, grid.zero_points
    return Grid(scales, zero_points, bits)


def _search_group(weights: torch.Tensor, block: torch.Tensor, bits: int) -> Grid:
    """The grid ``[N]`` of one group of inputs: weights ``[N, g]``, Gram block ``[g, g]``."""
    low, high = weights.amin(1), weights.amax(1)
    buffer, product = torch.empty_like(weights), torch.empty_like(weights)

    def errors(low_share: torch.Tensor, high_share: torch.Tensor) -> torch.Tensor:
        grid = grid_over(low * low_share, high * high_share, bits)
        difference = rounding_difference(weights, grid, out=buffer)
        return torch.mm(difference, block, out=product).mul_(difference).sum(1)

    low_share = torch.ones_like(low)
    high_share = torch.ones_like(high)
    best = errors(low_share, high_share)

    def consider(low_try: torch.Tensor, high_try: torch.Tensor) -> None:
        found = errors(low_try, high_try)
        better = found < best
        torch.where(better, found, best, out=best)
        torch.where(better, low_try, low_share, out=low_share)
        torch.where(better, high_try, high_share, out=high_share)

    full = torch.ones_like(low)
    for share in BOTH_ENDS:
        consider(full * share, full * share)
    for share in ONE_END:
        consider(full, full * share)
        consider(full * share, full)
    for step in REFINEMENTS:
        for change in (-step, step):
            consider((low_share + change).clamp(max=MAX_REACH), high_share.clone())
            consider(low_share.clone(), (high_share + change).clamp(max=MAX_REACH))
    return grid_over(low * low_share, high * high_share, bits)
