"""Grids of half-quadratic quantization: the many are rounded well, the few outliers pay."""

from __future__ import annotations

import pytest
import torch

from qserve.quant.grid import Grid, LevelSet, grid_over_all, rounding_difference
from qserve.quant.half_quadratic import POWER, solve_grid


def heavy_tailed(rows: int = 40, groups: int = 4, size: int = 64) -> torch.Tensor:
    """Weights with a few outliers in every group, and means beside zero."""
    draw = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(rows, groups, size, generator=draw) + 0.01
    outliers = torch.rand(weights.shape, generator=draw) < 0.02
    return torch.where(outliers, 5 * weights, weights)


def cost(weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    return rounding_difference(weights, grid).abs().pow(POWER).sum(-1)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.97), (3, 0.98), (4, 0.99), (8, 1.0)])
def test_no_group_is_worse_than_with_its_full_range_and_most_are_better(
    bits: int, share: float
) -> None:
    weights, levels = heavy_tailed(), LevelSet(bits)
    solved, spanned = (cost(weights, f(weights, levels)) for f in (solve_grid, grid_over_all))
    assert bool((solved <= spanned).all())
    assert float(solved.sum() / spanned.sum()) < share


@pytest.mark.parametrize("bits", [2, 4])
def test_no_weight_lies_more_than_half_a_step_outside(bits: int) -> None:
    weights, levels = heavy_tailed(), LevelSet(bits)
    grid = solve_grid(weights, levels)
    # A step of float16 is 2**-11 of a scale.
    limit = (0.5 + 2**bits * 2**-11) * grid.scales[..., None]
    assert bool((rounding_difference(weights, grid).abs() <= limit).all())


def test_grids_are_what_engines_read() -> None:
    grid = solve_grid(heavy_tailed(), LevelSet())
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert torch.equal(grid.zero_points, grid.zero_points.round())
    assert float(grid.zero_points.min()) >= 0
    assert float(grid.zero_points.max()) <= 15


def test_a_group_of_zeros_has_a_usable_grid() -> None:
    grid = solve_grid(torch.zeros(2, 3, 32), LevelSet())
    assert bool((grid.scales > 0).all())
    assert bool(torch.isfinite(grid.zero_points).all())
