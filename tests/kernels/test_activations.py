"""Rows rounded to int8."""

from __future__ import annotations

import torch

from qserve.kernels.activations import quantize_rows, round_rows


def test_a_rounded_row_is_within_half_a_step(generator: torch.Generator) -> None:
    x = torch.randn(4, 100, generator=generator)
    codes, scales = quantize_rows(x)
    assert codes.dtype is torch.int8 and codes.shape == (4, 100) and scales.shape == (4, 4)
    steps = scales.repeat_interleave(32, 1)[:, :100]
    assert ((round_rows(x) - x).abs() <= steps * 0.5001).all()


def test_the_largest_input_of_a_group_keeps_its_value(generator: torch.Generator) -> None:
    x = torch.randn(3, 96, generator=generator)
    codes, _ = quantize_rows(x)
    assert (codes.view(3, 3, 32).int().abs().amax(2) == 127).all()


def test_groups_do_not_share_a_scale_and_zeros_stay_zero() -> None:
    x = torch.cat([torch.full((1, 32), 1e-3), torch.zeros(1, 32), torch.full((1, 32), 1e3)], dim=1)
    assert torch.allclose(round_rows(x), x, rtol=1e-6, atol=0)
