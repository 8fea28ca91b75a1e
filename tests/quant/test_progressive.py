"""Whole-number scales of groups: within int8, and better than those rounded to the nearest."""

from __future__ import annotations

import torch

from qserve.quant.clipping import search_grid
from qserve.quant.grid import Grid, LevelSet, rounding_difference
from qserve.quant.objective import GramMatrix, output_errors
from qserve.quant.progressive import settle_in_rows

GROUP_SIZE = 32
LEVELS = LevelSet(scale_dtype=torch.float32, progressive=True)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose groups have very different sizes, and the Gram matrix of its inputs."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 4, GROUP_SIZE, generator=draw)
    weight *= (0.7 * torch.randn(40, 4, 1, generator=draw)).exp()
    gram = GramMatrix(4 * GROUP_SIZE)
    gram.add(torch.randn(1000, 4 * GROUP_SIZE, generator=draw))
    return weight.flatten(1), gram.mean()


def errors(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    return output_errors(rounding_difference(groups, grid).flatten(1), gram)


def test_scales_are_whole_multiples_that_keep_weights_within_int8() -> None:
    weight, gram = problem()
    grid = settle_in_rows(weight, gram, search_grid(weight, gram, GROUP_SIZE, LEVELS))
    assert grid.outer is not None
    whole = grid.scales / grid.outer[:, None]
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
    assert float(whole.min()) >= 0.999
    assert float((grid.reach() / grid.outer[:, None]).max()) < 127.5


def test_multiples_chosen_by_the_outputs_lose_less_than_the_nearest() -> None:
    weight, gram = problem()
    searched = search_grid(weight, gram, GROUP_SIZE, LEVELS)
    free, nearest, chosen = (
        float(errors(weight, gram, grid).sum())
        for grid in (searched, searched.settled(), settle_in_rows(weight, gram, searched))
    )
    assert free < chosen < free + 0.7 * (nearest - free)
