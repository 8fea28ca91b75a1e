"""The codes of one weight: range, rounding and refit put together."""

from __future__ import annotations

import torch

from qserve.quant.clipping import search_grid
from qserve.quant.grid import LevelSet, Rounded, nearest_levels
from qserve.quant.options import Rounding
from qserve.quant.refit import refit_scales
from qserve.quant.rounding import descend, feed_errors_back

NUM_PASSES = 2
"""Passes of coordinate descent before the refit; one follows it."""


def choose_codes(
    weight: torch.Tensor,
    gram: torch.Tensor,
    group_size: int,
    levels: LevelSet,
    rounding: Rounding,
) -> Rounded:
    """Codes for a weight ``[N, K]`` whose inputs have the Gram matrix ``[K, K]``."""
    grid = search_grid(weight, gram, group_size, levels).settled()
    if rounding is Rounding.NEAREST:
        return Rounded(nearest_levels(weight.unflatten(1, (-1, group_size)), grid), grid)
    found = feed_errors_back(weight, gram, grid)
    found = descend(weight, gram, grid, found, NUM_PASSES)
    grid = refit_scales(weight, gram, grid, found).settled()
    return Rounded(descend(weight, gram, grid, found, 1), grid)
