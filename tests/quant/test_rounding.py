"""Rounding that looks at all inputs together, and the scales refitted to its codes."""

from __future__ import annotations

import itertools

import pytest
import torch

from qserve.quant.codes import Coder
from qserve.quant.grid import Grid, LevelSet, grid_over_all, nearest_levels
from qserve.quant.objective import GramMatrix, output_errors
from qserve.quant.refit import refit_scales
from qserve.quant.rounding import (
    damped,
    descend,
    feed_errors_back,
    inverse_factor,
    plan_visit,
)
from qserve.quant.steps import DEFAULT_DAMPING, Rounding, Steps

GROUP_SIZE = 32
DAMPING = DEFAULT_DAMPING


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(num_inputs: int) -> torch.Tensor:
    """The Gram matrix of inputs that largely follow each other, as real ones do."""
    gram = GramMatrix(num_inputs)
    mixing = normal(num_inputs, num_inputs, seed=7) * normal(num_inputs, seed=8).exp()
    gram.add(normal(40 * num_inputs, num_inputs, seed=9) @ mixing)
    return gram.mean()


def problem(num_inputs: int = 160) -> tuple[torch.Tensor, torch.Tensor, Grid, torch.Tensor]:
    """A weight, the Gram matrix of its inputs, a grid and the nearest levels."""
    weight = normal(24, num_inputs)
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    grid = grid_over_all(groups, LevelSet())
    return weight, correlated_gram(num_inputs), grid, nearest_levels(groups, grid)


def errors(
    weight: torch.Tensor, gram: torch.Tensor, grid: Grid, levels: torch.Tensor
) -> torch.Tensor:
    """The output error of each row."""
    return output_errors((levels * grid.scales[..., None]).flatten(1) - weight, gram)


def assert_on_grid(grid: Grid, levels: torch.Tensor) -> None:
    """Every level is a code of the grid minus its zero point."""
    codes = levels + grid.zero_points[..., None]
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) >= 0 and float(codes.max()) <= 15


def test_feeding_errors_back_beats_rounding_each_weight_alone() -> None:
    weight, gram, grid, nearest = problem()
    levels = feed_errors_back(weight, plan_visit(gram, DAMPING), grid)
    assert_on_grid(grid, levels)
    found, alone = errors(weight, gram, grid, levels), errors(weight, gram, grid, nearest)
    assert float(found.sum()) < 0.5 * float(alone.sum())


def test_feedback_is_the_published_recursion() -> None:
    weight, gram, grid, _ = problem(96)
    order = gram.diagonal().argsort(descending=True)
    hessian = damped(gram, DAMPING)[order][:, order].double()
    values = weight[:, order].double()
    expected = torch.empty_like(values)
    scales = grid.scales.double().repeat_interleave(GROUP_SIZE, 1)[:, order]
    zeros = grid.zero_points.double().repeat_interleave(GROUP_SIZE, 1)[:, order]
    # Optimal brain surgeon, column by column, with the inverse of what is left each time.
    for i in range(96):
        inverse = torch.linalg.inv(hessian[i:, i:])
        code = (values[:, i] / scales[:, i]).round()
        expected[:, i] = torch.minimum(torch.maximum(code, -zeros[:, i]), 15 - zeros[:, i])
        error = (values[:, i] - expected[:, i] * scales[:, i]) / inverse[0, 0]
        values[:, i:] -= error[:, None] * inverse[0]
    found = feed_errors_back(weight, plan_visit(gram, DAMPING), grid).flatten(1)[:, order]
    # A tie in float32 may fall to the other side and then sends its row another way.
    assert float((found == expected).all(1).double().mean()) > 0.9


def test_without_correlation_every_weight_is_rounded_to_the_nearest() -> None:
    weight, _, grid, nearest = problem()
    visit = plan_visit(torch.diag(normal(160).exp()), DAMPING)
    assert torch.equal(feed_errors_back(weight, visit, grid), nearest)
    assert torch.equal(descend(weight, visit, grid, nearest, 3), nearest)


def test_no_pass_of_descent_makes_a_row_worse() -> None:
    weight, gram, grid, levels = problem()
    visit = plan_visit(gram, DAMPING)
    before = errors(weight, damped(gram, DAMPING), grid, levels)
    first = before
    for _ in range(4):
        levels = descend(weight, visit, grid, levels, 1)
        assert_on_grid(grid, levels)
        after = errors(weight, damped(gram, DAMPING), grid, levels)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    assert float(before.sum()) < 0.6 * float(first.sum())


def test_descent_ends_where_no_single_code_can_be_improved() -> None:
    weight, gram, grid, levels = problem(64)
    visit = plan_visit(gram, DAMPING)
    levels = descend(weight, visit, grid, levels, 30)
    reached = errors(weight, damped(gram, DAMPING), grid, levels)
    for column, change in itertools.product(range(64), (-1, 1)):
        tried = levels.clone()
        tried[:, column // GROUP_SIZE, column % GROUP_SIZE] += change
        codes = tried + grid.zero_points[..., None]
        allowed = ((codes >= 0) & (codes <= 15)).flatten(1).all(1)
        better = errors(weight, damped(gram, DAMPING), grid, tried) < reached * (1 - 1e-5)
        assert not bool((better & allowed).any()), column


def test_two_passes_are_one_after_the_other() -> None:
    weight, gram, grid, levels = problem()
    visit = plan_visit(gram, DAMPING)
    once = descend(weight, visit, grid, levels, 1)
    again = descend(weight, visit, grid, once, 1)
    both = descend(weight, visit, grid, levels, 2)
    assert float((again == both).double().mean()) > 0.999


def test_refitted_scales_improve_every_row_and_fit_float16() -> None:
    weight, gram, grid, levels = problem()
    refitted = refit_scales(weight, gram, grid, levels)
    before, after = errors(weight, gram, grid, levels), errors(weight, gram, refitted, levels)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < 0.97 * float(before.sum())
    assert torch.equal(refitted.scales, refitted.scales.half().float())
    assert torch.equal(refitted.zero_points, grid.zero_points)


def test_refitted_scales_are_the_least_squares_solution() -> None:
    weight, gram, grid, levels = problem(96)
    refitted = refit_scales(weight, gram, grid, levels)
    root = torch.linalg.cholesky(gram.double())
    for row in range(0, 24, 5):
        # One column a group: what the row gives when only that group is there, at scale one.
        parts = torch.zeros(3, 3, GROUP_SIZE, dtype=torch.float64)
        for group in range(3):
            parts[group, group] = levels[row, group].double()
        design = (parts.flatten(1) @ root).T
        target = root.T @ weight[row].double()
        expected = torch.linalg.lstsq(design, target).solution
        torch.testing.assert_close(refitted.scales[row].double(), expected, rtol=2e-3, atol=0)


def test_groups_of_zeros_survive_the_refit() -> None:
    weight, gram, _, _ = problem()
    weight[3] = 0
    weight[5, :GROUP_SIZE] = 0
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    grid = grid_over_all(groups, LevelSet())
    levels = nearest_levels(groups, grid)
    refitted = refit_scales(weight, gram, grid, levels)
    assert bool(torch.isfinite(refitted.scales).all()) and bool((refitted.scales > 0).all())
    assert not (levels * refitted.scales[..., None])[3].any()


@pytest.mark.parametrize("num_inputs", [64, 160])
def test_the_steps_together_beat_a_searched_range_alone(num_inputs: int) -> None:
    weight, gram, _, _ = problem(num_inputs)
    found = {
        rounding: float(
            output_errors(
                Coder(gram, GROUP_SIZE, LevelSet(), Steps(rounding=rounding))
                .choose(weight)
                .values()
                - weight,
                gram,
            ).sum()
        )
        for rounding in Rounding
    }
    assert found[Rounding.FEEDBACK] < 0.6 * found[Rounding.NEAREST]
    assert found[Rounding.FEEDBACK] < 0.9 * found[Rounding.PUBLISHED_FEEDBACK]


def test_groups_of_important_inputs_suit_them_at_least_as_well() -> None:
    weight, gram, _, _ = problem()
    steps = Steps(activation_order=True)
    found = Coder(gram, GROUP_SIZE, LevelSet(), steps).choose(weight)
    order = gram.diagonal().argsort(descending=True, stable=True)
    assert found.input_order is not None and torch.equal(found.input_order, order)
    packed = found.pack()
    torch.testing.assert_close(packed.dequantize(), found.values(), rtol=2e-3, atol=1e-6)
    error = output_errors(found.values() - weight, gram).sum()
    nearest = output_errors(
        Coder(gram, GROUP_SIZE, LevelSet(), Steps(rounding=Rounding.NEAREST))
        .choose(weight)
        .values()
        - weight,
        gram,
    ).sum()
    assert float(error / nearest) < 0.6


def test_damping_grows_until_the_gram_matrix_can_be_factored() -> None:
    few = normal(3, 64)  # rank 3 of 64: not definite
    gram = few.T @ few * 1e4
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(damped(gram, 1e-9))
    visit = plan_visit(gram, 1e-9)
    assert bool(torch.isfinite(visit.factor).all())
    assert float(visit.gram.diagonal().mean()) > (1 + 1e-8) * float(gram.diagonal().mean())
    definite = correlated_gram(64)
    visit = plan_visit(definite, DAMPING)
    assert torch.equal(visit.gram, damped(definite, DAMPING)[visit.order][:, visit.order])
