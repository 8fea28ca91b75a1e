"""The norm rounded to int8: native kernels of every instruction set against the norm itself."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.rms_norm import rms_norm
from qserve.kernels.rms_norm_int8 import reference, rms_norm_int8

EPS = 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 576), (3, 33), (40, 2048)], ids=str)
@pytest.mark.usefixtures("isa")
def test_codes_are_those_of_the_norm_rounded_with_its_largest_as_127(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    x, weight = torch.randn(shape, generator=generator), torch.randn(shape[1], generator=generator)
    normed = rms_norm(x, weight, EPS, weight_offset=0.5)
    codes, scales = rms_norm_int8(x, weight, EPS, weight_offset=0.5)
    largest = normed.abs().amax(1)
    assert torch.equal(scales, largest / 127)
    assert torch.equal(codes.float(), (normed * (127 / largest)[:, None]).round())
    assert (codes.abs().amax(1) == 127).all()


@pytest.mark.usefixtures("isa")
def test_the_reference_rounds_to_the_same_codes_but_for_halves(generator: torch.Generator) -> None:
    x, weight = torch.randn(9, 300, generator=generator), torch.randn(300, generator=generator)
    codes, scales = torch.empty(9, 300, dtype=torch.int8), torch.empty(9)
    reference.rms_norm_int8(x, weight, EPS, None, 0.0, codes, scales)
    native_codes, native_scales = rms_norm_int8(x, weight, EPS)
    assert torch.allclose(native_scales, scales, rtol=1e-6, atol=0)
    exact = rms_norm(x, weight, EPS) / scales[:, None]
    is_half = ((exact - exact.floor()) - 0.5).abs() < 1e-3  # where the last bit decides
    assert ((native_codes == codes) | is_half).all()
    assert is_half.float().mean() < 0.01


@pytest.mark.usefixtures("isa")
def test_a_residual_takes_the_sum(generator: torch.Generator) -> None:
    x, residual = torch.randn(2, 5, 60, generator=generator)
    weight, expected_sum = torch.randn(60, generator=generator), x + residual
    codes, scales = rms_norm_int8(x, weight, EPS, residual=residual)
    assert torch.equal(residual, expected_sum)
    expected_codes, expected_scales = rms_norm_int8(expected_sum, weight, EPS)
    assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)


@pytest.mark.usefixtures("isa")
def test_a_row_alone_and_in_a_batch_has_the_same_bits(generator: torch.Generator) -> None:
    x, weight = torch.randn(70, 576, generator=generator), torch.randn(576, generator=generator)
    codes, scales = rms_norm_int8(x, weight, EPS)
    for row in range(70):
        alone, scale = rms_norm_int8(x[row : row + 1], weight, EPS)
        assert torch.equal(alone[0], codes[row]) and scale == scales[row]


@pytest.mark.usefixtures("isa")
def test_zeros_have_a_scale_of_zero_and_nan_shows_in_the_scale() -> None:
    x = torch.zeros(2, 40)
    x[1, 39] = torch.nan
    codes, scales = rms_norm_int8(x, torch.ones(40), EPS)
    assert not codes[0].any()
    assert scales[0] == 0 and scales[1].isnan()


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        rms_norm_int8(torch.zeros(2, 8), torch.ones(9), EPS)
    with pytest.raises(TypeError, match="expected"):
        rms_norm_int8(torch.zeros(2, 8), torch.ones(8).half(), EPS)
