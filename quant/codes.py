"""The codes of one weight: range, rounding and refit put together."""

from __future__ import annotations

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.clipping import search_grid
from qserve.quant.grid import nearest_levels, to_grouped_weight
from qserve.quant.options import Rounding
from qserve.quant.refit import refit_scales
from qserve.quant.rounding import descend, feed_errors_back

NUM_PASSES = 2
"""Passes of coordinate descent before the refit; one follows it."""


def choose_codes(
    weight: torch.Tensor, gram: torch.Tensor, group_size: int, bits: int, rounding: Rounding
) -> GroupedWeight:
    """Codes for a weight ``[N, K]`` whose inputs have the Gram matrix ``[K, K]``."""
    grid = search_grid(weight, gram, group_size, bits)
    if rounding is Rounding.NEAREST:
        levels = nearest_levels(weight.unflatten(1, (-1, group_size)), grid)
        return to_grouped_weight(levels, grid)
    levels = feed_errors_back(weight, gram, grid)
    levels = descend(weight, gram, grid, levels, NUM_PASSES)
    grid = refit_scales(weight, gram, grid, levels)
    levels = descend(weight, gram, grid, levels, 1)
    return to_grouped_weight(levels, grid)
