"""Grids of 16 values: what is on them, and that rounding finds the nearest."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.quant.grid import (
    clipped_weights,
    grid_over,
    grid_over_all,
    nearest_levels,
    rounding_difference,
    split_rows,
    to_grouped_weight,
)


def quantized(weight: torch.Tensor) -> torch.Tensor:
    """A weight ``[N, K]`` after rounding in one group a row."""
    groups = weight[:, None]
    grid = grid_over_all(groups, 4)
    return to_grouped_weight(nearest_levels(groups, grid), grid).dequantize()


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
    grid = grid_over(weights.amin(1) * low_share, weights.amax(1) * high_share, 4)
    choices = (torch.arange(16.0) - grid.zero_points) * grid.scales
    nearest = (weights[..., None] - choices).abs().amin(-1)
    found = rounding_difference(weights, grid).abs()
    # Half a unit in the last place of the weights: a tie may fall to either side.
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4))
def test_scales_are_what_float16_stores_and_zero_is_on_the_grid(values: list[float]) -> None:
    grid = grid_over_all(torch.tensor([values]), 4)
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
    grid = grid_over_all(groups, 4)
    weight = to_grouped_weight(nearest_levels(groups, grid), grid)
    parts = split_rows(weight, [3, 7])
    assert [part.out_features for part in parts] == [3, 7]
    joined = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(joined, weight.dequantize())


def test_weights_beyond_their_grid_are_counted() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 1.5, 3.0, 0.1, 0.2, 0.3]])
    grid = grid_over(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 4)
    levels = nearest_levels(weight[:, None], grid)
    outside = clipped_weights(weight, to_grouped_weight(levels, grid))
    assert outside.tolist() == [[False, False, False, True, True, False, False, False]]
