"""The codes of one weight: range, rounding and refit put together."""

from __future__ import annotations

from dataclasses import replace

import torch

from qserve.quant.clipping import search_grid
from qserve.quant.grid import LevelSet, Rounded, grid_over_all, nearest_levels
from qserve.quant.progressive import settle_in_rows
from qserve.quant.published import round_columns, shrink_grid
from qserve.quant.refit import refit_scales
from qserve.quant.rounding import descend, feed_errors_back, sufficient_damping
from qserve.quant.steps import Range, Rounding, Steps

NUM_PASSES = 2
"""Passes of coordinate descent before the refit; one follows it."""


RANGES = {
    Range.FULL: lambda weight, _, group_size, levels: grid_over_all(
        weight.unflatten(1, (-1, group_size)), levels
    ),
    Range.SEARCHED: search_grid,
    Range.SHRUNK: shrink_grid,
}


def choose_codes(
    weight: torch.Tensor, gram: torch.Tensor, group_size: int, levels: LevelSet, steps: Steps
) -> Rounded:
    """Codes for a weight ``[N, K]`` whose inputs have the Gram matrix ``[K, K]``."""
    if not steps.activation_order:
        return _choose(weight, gram, group_size, levels, steps)
    order = gram.diagonal().argsort(descending=True, stable=True)
    found = _choose(weight[:, order], gram[order][:, order], group_size, levels, steps)
    return replace(found, input_order=order)


def _choose(
    weight: torch.Tensor, gram: torch.Tensor, group_size: int, levels: LevelSet, steps: Steps
) -> Rounded:
    if steps.rounding is Rounding.PUBLISHED_FEEDBACK:
        damping = sufficient_damping(gram, steps.damping)
        return round_columns(weight, gram, group_size, levels, damping)
    grid = RANGES[steps.range](weight, gram, group_size, levels)
    grid = settle_in_rows(weight, gram, grid) if levels.progressive else grid.settled()
    if steps.rounding is Rounding.NEAREST:
        return Rounded(nearest_levels(weight.unflatten(1, (-1, group_size)), grid), grid)
    damping = sufficient_damping(gram, steps.damping)
    found = feed_errors_back(weight, gram, grid, damping)
    found = descend(weight, gram, grid, found, NUM_PASSES, damping)
    if not levels.progressive:  # whole multiples are too coarse to follow a refit
        grid = refit_scales(weight, gram, grid, found).settled()
    return Rounded(descend(weight, gram, grid, found, 1, damping), grid)
