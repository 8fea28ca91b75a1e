"""Rows rounded to int8."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.activations import Activations, quantize_rows, round_activations


def test_a_rounded_row_is_within_half_a_step(generator: torch.Generator) -> None:
    x = torch.randn(4, 100, generator=generator)
    codes, scales = quantize_rows(x)
    assert codes.dtype is torch.int8 and codes.shape == (4, 100) and scales.shape == (4, 4)
    steps = scales.repeat_interleave(32, 1)[:, :100]
    assert ((round_activations(x, Activations.INT8) - x).abs() <= steps * 0.5001).all()


def test_the_largest_input_of_a_group_keeps_its_value(generator: torch.Generator) -> None:
    x = torch.randn(3, 96, generator=generator)
    codes, _ = quantize_rows(x)
    assert (codes.view(3, 3, 32).int().abs().amax(2) == 127).all()


def test_groups_do_not_share_a_scale_and_zeros_stay_zero() -> None:
    x = torch.cat([torch.full((1, 32), 1e-3), torch.zeros(1, 32), torch.full((1, 32), 1e3)], dim=1)
    assert torch.allclose(round_activations(x, Activations.INT8), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("activations", "largest_code", "step"),
    [(Activations.INT8_TOKEN, 127.0, 0.5 / 127), (Activations.FLOAT8_TOKEN, 448.0, 2.0**-4)],
)
def test_a_row_rounded_with_one_scale_is_within_half_a_step(
    activations: Activations, largest_code: float, step: float, generator: torch.Generator
) -> None:
    x = torch.randn(5, 70, generator=generator)
    x[3] = 0
    rounded = round_activations(x, activations)
    largest = x.abs().amax(1, keepdim=True)
    smallest_step = largest * 2.0**-10 / largest_code  # of float8: half of 2^-9
    relative = x.abs() if activations is Activations.FLOAT8_TOKEN else largest
    assert ((rounded - x).abs() <= torch.maximum(relative * step * 1.0001, smallest_step)).all()
    assert not rounded[3].any()


@pytest.mark.parametrize("activations", [Activations.INT8_TOKEN, Activations.FLOAT8_TOKEN])
def test_rounding_a_token_twice_changes_nothing(
    activations: Activations, generator: torch.Generator
) -> None:
    once = round_activations(torch.randn(3, 64, generator=generator), activations)
    assert torch.allclose(round_activations(once, activations), once, rtol=1e-6, atol=0)


def test_exact_activations_are_not_touched(generator: torch.Generator) -> None:
    x = torch.randn(3, 64, generator=generator)
    assert torch.equal(round_activations(x, Activations.FLOAT32), x)
