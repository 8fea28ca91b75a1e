"""The norm: native kernels of every instruction set against the definition."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.rms_norm import rms_norm

EPS = 1e-5


def by_definition(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(1, 1), (1, 576), (3, 33), (40, 2048)], ids=str)
@pytest.mark.usefixtures("isa")
def test_rows_are_divided_by_their_root_mean_square(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    x, weight = torch.randn(shape, generator=generator), torch.randn(shape[1], generator=generator)
    expected = by_definition(x, weight)
    # Three roundings, and half of the mean's error: a few units of 2^-24.
    assert ((rms_norm(x, weight, EPS) - expected).abs() <= 1e-6 * expected.abs()).all()


def test_one_step_of_a_bfloat16_input_exceeds_the_tolerance(generator: torch.Generator) -> None:
    x, weight = torch.randn(2, 64, generator=generator).bfloat16(), torch.ones(64)
    right = rms_norm(x.float(), weight, EPS)
    x.view(torch.int16)[1, 7] += 1
    wrong = rms_norm(x.float(), weight, EPS)
    assert (wrong - right).abs()[1, 7] > 1e-3 * right.abs()[1, 7]


@pytest.mark.usefixtures("isa")
def test_a_residual_takes_the_sum_and_its_norm_comes_out(generator: torch.Generator) -> None:
    wide = torch.randn(5, 100, generator=generator)
    x, residual = wide[:, 10:70], torch.randn(5, 60, generator=generator)
    weight, expected_sum = torch.randn(60, generator=generator), x + residual
    y = rms_norm(x, weight, EPS, residual=residual)
    assert torch.equal(residual, expected_sum)
    expected = by_definition(expected_sum, weight)
    assert ((y - expected).abs() <= 1e-6 * expected.abs()).all()


@pytest.mark.usefixtures("isa")
def test_an_offset_is_added_to_the_weight(generator: torch.Generator) -> None:
    x, weight = torch.randn(3, 50, generator=generator), torch.randn(50, generator=generator)
    assert torch.equal(rms_norm(x, weight, EPS, weight_offset=1.0), rms_norm(x, 1 + weight, EPS))


@pytest.mark.usefixtures("isa")
def test_the_output_may_be_the_input(generator: torch.Generator) -> None:
    x, weight = torch.randn(3, 40, generator=generator), torch.ones(40)
    expected = rms_norm(x, weight, EPS)
    assert rms_norm(x, weight, EPS, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.usefixtures("isa")
def test_a_row_alone_and_in_a_batch_has_the_same_bits(generator: torch.Generator) -> None:
    x, weight = torch.randn(70, 576, generator=generator), torch.randn(576, generator=generator)
    together = rms_norm(x, weight, EPS)
    for row in range(70):
        assert torch.equal(rms_norm(x[row : row + 1], weight, EPS)[0], together[row])


def test_zeros_stay_zeros() -> None:
    assert not rms_norm(torch.zeros(2, 8), torch.ones(8), EPS).any()


@pytest.mark.parametrize(
    ("x", "weight", "residual", "error"),
    [
        (torch.zeros(2, 8), torch.ones(9), None, ValueError),
        (torch.zeros(2, 8), torch.ones(8, 1), None, ValueError),
        (torch.zeros(2, 8), torch.ones(8), torch.zeros(2, 9), ValueError),
        (torch.zeros(2, 8), torch.ones(8), torch.zeros(1, 8), ValueError),
        (torch.zeros(8), torch.ones(8), None, ValueError),
        (torch.zeros(2, 8).half(), torch.ones(8), None, TypeError),
        (torch.zeros(2, 8), torch.ones(8).half(), None, TypeError),
        (torch.zeros(2, 8), torch.ones(16)[::2], None, ValueError),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    error: type[Exception],
) -> None:
    with pytest.raises(error, match="expected"):
        rms_norm(x, weight, EPS, residual=residual)
