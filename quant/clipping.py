"""The range step: how far the grid of each group reaches, judged by the Gram matrix of its inputs.

A narrower range rounds most weights better and a few large ones worse. Both ends are searched.
"""

from __future__ import annotations

import torch

from qserve.quant.grid import Grid, LevelSet, rounding_difference
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


WIDEST_BLOCK = 256
"""Groups wider than this are judged by the diagonal of their Gram block alone: a whole product for
each candidate would cost more than all of the rounding that follows."""


def search_grid(
    weight: torch.Tensor, gram: torch.Tensor, group_size: int, levels: LevelSet
) -> Grid:
    """The grid ``[N, G]`` for which rounding to nearest has the least error, group by group.

    weight: ``[N, K]``. gram: ``[K, K]``; only the block of each group counts, so the groups of a
    row do not see each other. The full range is a candidate: no group ends worse than with it.
    """
    blocks = diagonal_blocks(gram, group_size)
    groups = weight.unflatten(1, (-1, group_size))
    scales = torch.empty(groups.shape[:2])
    zero_points = torch.empty(groups.shape[:2])
    for index, block in enumerate(blocks):
        grid = _search_group(groups[:, index].contiguous(), block, levels)
        scales[:, index], zero_points[:, index] = grid.scales, grid.zero_points
    return Grid(scales, zero_points, levels)


class _Search:
    """The best range so far of one group of inputs: weights ``[N, g]``, Gram block ``[g, g]``."""

    def __init__(self, weights: torch.Tensor, block: torch.Tensor, levels: LevelSet) -> None:
        self._weights = weights
        self._block = block if len(block) <= WIDEST_BLOCK else block.diagonal()
        self._levels = levels
        self._low, self._high = weights.amin(1), weights.amax(1)
        self._buffer, self._product = torch.empty_like(weights), torch.empty_like(weights)
        self.low_share = torch.ones_like(self._low)
        self.high_share = torch.ones_like(self._high)
        self._best = self._errors(self.low_share, self.high_share)

    def grid(self) -> Grid:
        """The grid ``[N]`` of the best range."""
        return self._levels.span(self._low * self.low_share, self._high * self.high_share)

    def consider(self, low_share: torch.Tensor, high_share: torch.Tensor) -> None:
        """Take these shares ``[N]`` of the full range where they are better."""
        found = self._errors(low_share, high_share)
        better = found < self._best
        self._best = torch.where(better, found, self._best)
        self.low_share = torch.where(better, low_share, self.low_share)
        self.high_share = torch.where(better, high_share, self.high_share)

    def _errors(self, low_share: torch.Tensor, high_share: torch.Tensor) -> torch.Tensor:
        grid = self._levels.span(self._low * low_share, self._high * high_share)
        difference = rounding_difference(self._weights, grid, out=self._buffer)
        if self._block.dim() == 1:
            return difference.square_() @ self._block
        return torch.mm(difference, self._block, out=self._product).mul_(difference).sum(1)


def _search_group(weights: torch.Tensor, block: torch.Tensor, levels: LevelSet) -> Grid:
    search = _Search(weights, block, levels)
    full = torch.ones_like(search.low_share)
    for share in BOTH_ENDS:
        search.consider(full * share, full * share)
    if levels.is_symmetric:
        for step in REFINEMENTS:
            for change in (-step, step):
                both = (search.low_share + change).clamp(max=MAX_REACH)
                search.consider(both, both)
        return search.grid()
    for share in ONE_END:
        search.consider(full, full * share)
        search.consider(full * share, full)
    for step in REFINEMENTS:
        for change in (-step, step):
            search.consider((search.low_share + change).clamp(max=MAX_REACH), search.high_share)
            search.consider(search.low_share, (search.high_share + change).clamp(max=MAX_REACH))
    return search.grid()
