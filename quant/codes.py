"""The codes of the weights of a stage: range, rounding and refit put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight, concatenate_rows
from qserve.quant.clipping import search_grid
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.grid import Grid, LevelSet, Rounded, grid_over_all, nearest_levels
from qserve.quant.progressive import settle_in_rows
from qserve.quant.published import round_columns, shrink_grid
from qserve.quant.refit import refit_scales
from qserve.quant.rounding import Visit, descend, factor_damped, feed_errors_back, plan_visit
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


class Coder:
    """Chooses codes for rows whose inputs have one Gram matrix ``[K, K]``.

    What follows from that alone is made once, for all rows.
    """

    def __init__(self, gram: torch.Tensor, group_size: int, levels: LevelSet, steps: Steps) -> None:
        self._order: torch.Tensor | None = None
        if steps.activation_order:
            self._order = gram.diagonal().argsort(descending=True, stable=True)
            gram = gram[self._order[:, None], self._order]
        self._gram = gram
        self._group_size = group_size
        self._levels = levels
        self._choose = self._chooser(steps)

    def choose(self, weight: torch.Tensor) -> Rounded:
        """Codes for some rows, ``[N, K]``."""
        if self._order is None:
            return self._choose(weight)
        return replace(self._choose(weight[:, self._order]), input_order=self._order)

    def _chooser(self, steps: Steps) -> Callable[[torch.Tensor], Rounded]:
        """What takes the steps for a weight whose columns are in the order of the groups."""
        gram, group_size, levels = self._gram, self._group_size, self._levels
        if steps.rounding is Rounding.PUBLISHED_FEEDBACK:
            _, factor = factor_damped(gram, steps.damping)
            return lambda weight: round_columns(weight, factor, group_size, levels)
        choose_grid = RANGES[steps.range]
        settle = settle_in_rows if levels.progressive else lambda _, __, grid: grid.settled()
        visit = plan_visit(gram, steps.damping) if steps.rounding is Rounding.FEEDBACK else None

        def choose(weight: torch.Tensor) -> Rounded:
            grid = settle(weight, gram, choose_grid(weight, gram, group_size, levels))
            if visit is None:
                return Rounded(nearest_levels(weight.unflatten(1, (-1, group_size)), grid), grid)
            return _feed_back(weight, gram, grid, visit)

        return choose


def _feed_back(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, visit: Visit) -> Rounded:
    found = feed_errors_back(weight, visit, grid)
    found = descend(weight, visit, grid, found, NUM_PASSES)
    if not grid.levels.progressive:  # whole multiples are too coarse to follow a refit
        grid = refit_scales(weight, gram, grid, found).settled()
    return Rounded(descend(weight, visit, grid, found, 1), grid)


def join_rows(pieces: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The codes of one layer, of which pieces with some rows each were chosen.

    Codes from a codebook come in one piece: their scales are quantized together.
    """
    if len(pieces) == 1:
        return pieces[0]
    grouped = [one for one in pieces if isinstance(one, GroupedWeight)]
    if grouped:
        return concatenate_rows(grouped)
    floats = [one for one in pieces if isinstance(one, Float8Weight)]
    return Float8Weight(
        torch.cat([one.values for one in floats]),
        torch.cat([one.scales for one in floats]),
        floats[0].block,
    )
