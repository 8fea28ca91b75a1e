"""The search for scales: no worse than none, better where inputs differ, shared where needed."""

from __future__ import annotations

import pytest
import torch

from qserve.quant.grid import LevelSet, grid_over_all, rounding_difference
from qserve.quant.objective import GramMatrix
from qserve.quant.scaling import HeadSharing, ScaledPart, ScaledStage, ScaleSearch

GROUP_SIZE = 32


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of inputs given in one piece."""
    gram = GramMatrix(inputs.shape[-1])
    gram.add(inputs)
    return gram.mean()


def search(
    inputs: torch.Tensor, weight: torch.Tensor, sharing: HeadSharing | None = None
) -> ScaleSearch:
    return ScaleSearch(
        ScaledStage(
            [ScaledPart([weight], lambda: gram_of(inputs), GROUP_SIZE, LevelSet())], sharing
        )
    )


def output_error(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> float:
    """Brute force: what rounding the scaled weight does to the outputs."""
    groups = (weight * scale).unflatten(1, (-1, GROUP_SIZE))
    difference = rounding_difference(groups, grid_over_all(groups, LevelSet())).flatten(1)
    return float(((inputs / scale).double() @ difference.double().T).square().mean(0).sum())


def outlying_inputs() -> torch.Tensor:
    """Inputs of which a few are far larger than the others, as in real models."""
    inputs = normal(400, 64)
    inputs[:, [3, 40]] *= 30
    return inputs


def test_a_scale_protects_inputs_that_matter() -> None:
    inputs, weight = outlying_inputs(), normal(96, 64, seed=1)
    choice = search(inputs, weight).run()
    assert choice.error < 0.3 * choice.unscaled_error
    assert choice.scale[[3, 40]].min() > choice.scale.median()


def test_the_errors_are_those_of_the_outputs() -> None:
    inputs, weight = outlying_inputs(), normal(300, 64, seed=1)
    choice = search(inputs, weight).run()
    expected = output_error(inputs, weight, choice.scale)
    assert choice.error == pytest.approx(expected, rel=1e-4)
    unscaled = output_error(inputs, weight, torch.ones(64))
    assert choice.unscaled_error == pytest.approx(unscaled, rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_is_worse_than_no_scaling(seed: int) -> None:
    inputs = normal(200, 64, seed=seed) * normal(64, seed=seed + 1).exp()
    weight = normal(160, 64, seed=seed + 2) * normal(64, seed=seed + 3).exp()
    choice = search(inputs, weight).run()
    assert choice.error <= choice.unscaled_error
    assert output_error(inputs, weight, choice.scale) <= (
        output_error(inputs, weight, torch.ones(64)) * (1 + 1e-4)
    )


def test_no_scaling_is_chosen_when_nothing_is_better() -> None:
    weight = torch.tensor([-8.0, 7.0] * 16).repeat(32, 2)  # on the grid already, in every group
    choice = search(outlying_inputs(), weight).run()
    assert torch.equal(choice.scale, torch.ones(64))
    assert (choice.input_exponent, choice.weight_exponent) == (0.0, 0.0)


def test_query_heads_of_one_value_head_share_their_scale() -> None:
    sharing = HeadSharing(head_dim=16, repeats=2)
    choice = search(outlying_inputs(), normal(64, 64, seed=1), sharing).run()
    assert choice.error < choice.unscaled_error
    by_head = choice.scale.view(2, 2, 16)
    assert torch.equal(by_head[:, 0], by_head[:, 1])
    assert torch.equal(sharing.of_rows(choice.scale), by_head[:, 0].flatten())


def test_dead_inputs_and_zero_weights_give_finite_scales() -> None:
    inputs, weight = outlying_inputs(), normal(64, 64, seed=1)
    inputs[:, 5] = 0
    weight[:, 7] = 0
    weight[9] = 0.25
    found = search(inputs, weight)
    for exponents in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        scale = found.scale_at(*exponents)
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    assert found.run().error < float("inf")
