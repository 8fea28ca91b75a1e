"""The methods as they were published: the definitions, computed the slow way."""

from __future__ import annotations

import pytest
import torch

from qserve.quant.grid import LevelSet, Zero, grid_over_all, nearest_levels, rounding_difference
from qserve.quant.objective import GramMatrix, output_errors
from qserve.quant.published import PublishedScaleSearch, round_columns, shrink_grid
from qserve.quant.rounding import damped, factor_damped
from qserve.quant.scaling import HeadSharing, ScaledPart, ScaledStage

GROUP_SIZE = 16
DAMPING = 0.01


def problem(num_inputs: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, inputs some of which are much larger than others, and their Gram matrix."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(24, num_inputs, generator=draw)
    inputs = torch.randn(6, 100, num_inputs, generator=draw)
    inputs *= (1.5 * torch.randn(num_inputs, generator=draw)).exp()
    inputs[..., 1:] += inputs[..., :-1]
    gram = GramMatrix(num_inputs)
    gram.add(inputs)
    return weight, inputs, gram.mean()


def round_one_by_one(weight: torch.Tensor, gram: torch.Tensor, levels: LevelSet) -> torch.Tensor:
    """Optimal brain surgery: round a column, let the others make up for it, drop it from H."""
    rest, hessian = weight.double(), damped(gram, DAMPING).double()
    values = []
    for index in range(weight.shape[1]):
        if index % GROUP_SIZE == 0:
            grid = grid_over_all(rest[:, :GROUP_SIZE].float(), levels)
        column = rest[:, 0]
        value = nearest_levels(column.float()[:, None], grid)[:, 0] * grid.scales
        values.append(value)
        inverse = torch.linalg.inv(hessian)
        error = (column - value.double()) / inverse[0, 0]
        rest = (rest - error[:, None] * inverse[0])[:, 1:]
        hessian = hessian[1:, 1:]
    return torch.stack(values, dim=1)


@pytest.mark.parametrize("zero", [Zero.FREE, Zero.MIDDLE])
def test_columns_are_rounded_as_optimal_brain_surgery_does(zero: Zero) -> None:
    weight, _, gram = problem()
    levels = LevelSet(zero=zero)
    found = round_columns(weight, factor_damped(gram, DAMPING)[1], GROUP_SIZE, levels)
    expected = round_one_by_one(weight, gram, levels)
    # A weight half way between two levels may go either way, and takes the later ones with it.
    same = (found.values() - expected).abs() < 1e-3
    assert float(same.float().mean()) > 0.97


def test_rows_that_are_one_group_have_the_range_of_the_weights() -> None:
    weight, _, gram = problem()
    found = round_columns(weight, factor_damped(gram, DAMPING)[1], 64, LevelSet())
    assert torch.equal(found.grid.scales, grid_over_all(weight[:, None], LevelSet()).scales)
    nearest = rounding_difference(weight[:, None], found.grid)[:, 0]
    errors = [float(output_errors(d, gram).sum()) for d in (found.values() - weight, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_the_scale_is_the_best_power_of_the_mean_magnitude() -> None:
    weight, inputs, gram = problem()
    choice = PublishedScaleSearch(
        ScaledStage([ScaledPart([weight], lambda: gram, GROUP_SIZE, LevelSet())], None), inputs
    ).run()
    magnitude = inputs.abs().mean((0, 1))
    expected = inputs.flatten(0, 1) @ weight.T

    def error(exponent: float) -> float:
        scale = magnitude**exponent
        groups = (weight * scale).unflatten(1, (-1, GROUP_SIZE))
        rounded = weight * scale + rounding_difference(
            groups, grid_over_all(groups, LevelSet())
        ).flatten(1)
        found = (inputs / scale).flatten(0, 1) @ rounded.T
        return float((found - expected).square().sum())

    errors = {i / 20: error(i / 20) for i in range(20)}
    assert choice.input_exponent == min(errors, key=errors.__getitem__) > 0
    assert choice.error < choice.unscaled_error
    ratio = choice.scale / magnitude**choice.input_exponent
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_shared_inputs_get_shared_scales() -> None:
    weight, inputs, gram = problem()
    sharing = HeadSharing(head_dim=8, repeats=1)
    choice = PublishedScaleSearch(
        ScaledStage([ScaledPart([weight], lambda: gram, GROUP_SIZE, LevelSet())], sharing), inputs
    ).run()
    assert torch.equal(sharing.share(choice.scale), choice.scale)


def test_no_group_is_worse_for_a_range_drawn_in() -> None:
    weight, _, gram = problem()
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    errors = []
    for grid in (
        shrink_grid(weight, gram, GROUP_SIZE, LevelSet(3)),
        grid_over_all(groups, LevelSet(3)),
    ):
        difference = rounding_difference(groups, grid)
        blocks = torch.stack(
            [gram[i : i + GROUP_SIZE, i : i + GROUP_SIZE] for i in range(0, 64, GROUP_SIZE)]
        )
        errors.append(torch.einsum("ngi,gij,ngj->ng", difference, blocks, difference))
    assert bool((errors[0] <= errors[1]).all())
    assert float(errors[0].sum() / errors[1].sum()) < 0.95
