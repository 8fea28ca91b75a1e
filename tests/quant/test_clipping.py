"""The search for ranges: no group ends worse than with its full range."""

from __future__ import annotations

import pytest
import torch

from qserve.quant.clipping import search_grid
from qserve.quant.grid import Grid, LevelSet, grid_over_all, rounding_difference
from qserve.quant.objective import GramMatrix, diagonal_blocks

GROUP_SIZE = 32


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of inputs given in one piece."""
    gram = GramMatrix(inputs.shape[-1])
    gram.add(inputs)
    return gram.mean()


def group_errors(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Output error ``[N, G]`` of each group alone."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    difference = rounding_difference(groups, grid)
    blocks = diagonal_blocks(gram, GROUP_SIZE)
    return torch.einsum("ngi,gij,ngj->ng", difference, blocks, difference)


@pytest.mark.parametrize("seed", range(4))
def test_no_group_is_worse_than_with_its_full_range(seed: int) -> None:
    weight = normal(48, 96, seed=seed) ** 3  # heavy tails
    gram = gram_of(normal(200, 96, seed=seed + 1) @ normal(96, 96, seed=seed + 2))
    full = group_errors(
        weight, gram, grid_over_all(weight.unflatten(1, (-1, GROUP_SIZE)), LevelSet())
    )
    found = group_errors(weight, gram, search_grid(weight, gram, GROUP_SIZE, LevelSet()))
    assert bool((found <= full * (1 + 1e-4)).all())
    assert float(found.sum()) < 0.9 * float(full.sum())


def test_a_large_weight_on_a_quiet_input_is_cut_off() -> None:
    weight = normal(8, GROUP_SIZE)
    weight[:, 4] = 8
    inputs = normal(200, GROUP_SIZE)
    loud = search_grid(weight, gram_of(inputs), GROUP_SIZE, LevelSet())
    inputs[:, 4] *= 0.01
    quiet = search_grid(weight, gram_of(inputs), GROUP_SIZE, LevelSet())
    assert bool((quiet.scales < loud.scales).all())
    assert float(quiet.scales.mean()) < 0.85 * float(loud.scales.mean())


def test_weights_on_a_grid_keep_it() -> None:
    levels = torch.randint(-7, 8, (4, GROUP_SIZE), generator=torch.Generator().manual_seed(0))
    levels[:, 0], levels[:, 1] = -7, 8
    weight = levels * 0.25
    grid = search_grid(weight, gram_of(normal(100, GROUP_SIZE)), GROUP_SIZE, LevelSet())
    assert torch.equal(grid.scales, torch.full((4, 1), 0.25))
    assert not rounding_difference(weight[:, None], grid).any()


def test_groups_of_zeros_and_of_one_sign_are_handled() -> None:
    weight = torch.cat([torch.zeros(1, 64), normal(1, 64).abs() + 1, -normal(1, 64).abs() - 1])
    gram = gram_of(normal(100, 64))
    grid = search_grid(weight, gram, GROUP_SIZE, LevelSet())
    difference = rounding_difference(weight.unflatten(1, (-1, GROUP_SIZE)), grid)
    assert not difference[0].any()
    assert float(difference.abs().max()) < 0.6
