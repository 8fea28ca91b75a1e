"""The refit step: the best scales for codes that are already chosen."""

from __future__ import annotations

import torch

from qserve.quant.grid import MIN_SCALE, Grid
from qserve.quant.objective import ROWS_AT_ONCE

RIDGE = 1e-4
"""Share of the mean diagonal added to each row's equations, pulling towards the scales it has."""

MAX_CHANGE = 2.0
"""Scales that would change by more than this factor stay as they are."""


def refit_scales(
    weight: torch.Tensor, gram: torch.Tensor, grid: Grid, levels: torch.Tensor
) -> Grid:
    """The grid ``[N, G]`` with the scales that suit the levels ``[N, G, group_size]`` best.

    With its levels fixed, a row is linear in its G scales: ``tr((V - W) H (V - W)^T)`` is least
    for the solution of ``M s = r`` with ``M_ij = t_i^T H_ij t_j`` and ``r_i = t_i^T (H w)_i``, t_i
    being the levels of group i and H_ij the block of H between groups i and j. Rows that would end
    worse after rounding the scales to their stored type keep theirs.
    """
    scales = grid.scales.clone()
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part = Grid(grid.scales[rows], grid.zero_points[rows], grid.levels)
        scales[rows] = _refit_rows(weight[rows], gram, part, levels[rows])
    return Grid(scales, grid.zero_points, grid.levels)


def _refit_rows(
    weight: torch.Tensor, gram: torch.Tensor, grid: Grid, levels: torch.Tensor
) -> torch.Tensor:
    scales = grid.scales
    num_groups, group_size = levels.shape[1:]
    matrix = torch.empty(len(weight), num_groups, num_groups)
    for i in range(num_groups):
        mixed = levels[:, i] @ gram[i * group_size : (i + 1) * group_size]  # [N, K]
        matrix[:, i] = mixed.view_as(levels).mul_(levels).sum(-1)
    target = (weight @ gram).view_as(levels).mul_(levels).sum(-1)

    ridge = RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None] + torch.finfo().tiny
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge)
    found = torch.linalg.solve(damped, target + ridge * scales)
    change = found / scales
    allowed = (change > 1 / MAX_CHANGE) & (change < MAX_CHANGE) & (found.abs() > MIN_SCALE)
    found = grid.levels.stored(torch.where(allowed, found, scales))

    def error(candidate: torch.Tensor) -> torch.Tensor:
        """The error of each row, up to a constant."""
        values = candidate.double()
        product = (matrix.double() @ values[..., None])[..., 0]
        return (values * (product - 2 * target.double())).sum(1)

    return torch.where((error(found) < error(scales))[:, None], found, scales)
