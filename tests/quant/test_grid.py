"""Grids of 16 values: what is on them, and that rounding finds the nearest."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.quant.grid import (
    LevelSet,
    Rounded,
    Zero,
    grid_over_all,
    nearest_levels,
    rounding_difference,
)


def quantized(weight: torch.Tensor) -> torch.Tensor:
    """A weight ``[N, K]`` after rounding in one group a row."""
    groups = weight[:, None]
    grid = grid_over_all(groups, LevelSet())
    return Rounded(nearest_levels(groups, grid), grid).values()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8),
    st.floats(0.25, 1),
    st.floats(0.25, 1),
)
def test_no_value_of_the_grid_is_nearer_than_the_chosen_one(
    values: list[float], low_share: float, high_share: float
) -> None:
    weights = torch.tensor([values])
    grid = LevelSet().span(weights.amin(1) * low_share, weights.amax(1) * high_share)
    choices = (torch.arange(16.0) - grid.zero_points) * grid.scales
    nearest = (weights[..., None] - choices).abs().amin(-1)
    found = rounding_difference(weights, grid).abs()
    # Half a unit in the last place of the weights: a tie may fall to either side.
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4))
def test_scales_are_what_float16_stores_and_zero_is_on_the_grid(values: list[float]) -> None:
    grid = grid_over_all(torch.tensor([values]), LevelSet())
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert torch.equal(grid.zero_points, grid.zero_points.round())
    assert 0 <= float(grid.zero_points) <= 15
    assert bool(torch.isfinite(grid.scales).all()) and float(grid.scales) > 0


def test_groups_on_one_side_of_zero_keep_their_values() -> None:
    weight = torch.stack([torch.linspace(1.0, 1.1, 32), -torch.linspace(1.0, 1.1, 32)])
    step = 1.1 / 15
    assert float((quantized(weight) - weight).abs().max()) <= step / 2 + 1e-3


def test_constant_rows_are_kept_up_to_the_rounding_of_the_scale() -> None:
    weight = torch.tensor([[0.5], [-0.25], [0.0]]).expand(3, 32)
    assert torch.equal(quantized(weight)[2], torch.zeros(32))
    torch.testing.assert_close(quantized(weight), weight.contiguous(), rtol=2**-11, atol=0)


def test_packed_layers_come_apart_as_they_were() -> None:
    groups = torch.randn(10, 2, 8, generator=torch.Generator().manual_seed(0))
    grid = grid_over_all(groups, LevelSet())
    weight = Rounded(nearest_levels(groups, grid), grid)
    parts = [part.pack() for part in weight.split([3, 7])]
    assert [part.out_features for part in parts] == [3, 7]
    joined = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(joined, weight.values())


def test_weights_beyond_their_grid_are_counted() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 1.5, 3.0, 0.1, 0.2, 0.3]])
    grid = LevelSet().span(torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    levels = nearest_levels(weight[:, None], grid)
    outside = Rounded(levels, grid).clipped(weight)
    assert outside.tolist() == [[False, False, False, True, True, False, False, False]]


def test_a_symmetric_grid_puts_the_larger_side_of_a_group_on_its_extra_code() -> None:
    groups = torch.tensor([[-1.0, 0.3, 0.7], [1.0, -0.3, -0.7], [-7.0, 7.0, 0.0]])
    grid = grid_over_all(groups, LevelSet(4, Zero.MIDDLE))
    assert grid.zero_points.tolist() == [8, 8, 8]
    assert grid.scales[0] == 0.125 and grid.scales[1] == -0.125 and abs(grid.scales[2]) == 1
    levels = nearest_levels(groups, grid)
    assert levels[:, 0].tolist() == [-8, -8, -7]
    values = levels * grid.scales[:, None]
    assert bool(((values - groups).abs() <= grid.scales.abs()[:, None] / 2).all())


def test_centered_codes_stay_within_127_of_zero() -> None:
    groups = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    grid = grid_over_all(groups, LevelSet(8, Zero.CENTERED, scale_dtype=torch.float32))
    levels = nearest_levels(4 * groups, grid)
    assert bool((grid.scales > 0).all())
    assert float(levels.min()) == -127 and float(levels.max()) == 127


def test_codebook_levels_are_the_nearest_entries_and_pack_to_what_they_stand_for() -> None:
    squares = (-64, -49, -36, -25, -16, -9, -4, -1, 0, 1, 4, 9, 16, 36, 49, 64)
    levels = LevelSet(codebook=tuple(value / 64 for value in squares))
    groups = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(2))
    grid = grid_over_all(groups, levels)
    rounded = Rounded(nearest_levels(groups, grid), grid)
    table = torch.tensor(squares) / 64 * grid.scales[..., None, None]
    nearest = (groups[..., None] - table).abs().amin(-1).flatten(1)
    torch.testing.assert_close((rounded.values() - groups.flatten(1)).abs(), nearest)
    assert torch.equal(rounded.pack().dequantize(), rounded.values())
