"""Layer norm: native kernels of every instruction set against the definition."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.layer_norm import layer_norm, reference

EPS = 1e-5
TOLERANCE = 2e-6
"""Of the largest magnitude that is added up: the distances from the mean cancel, then the bias."""


def by_definition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(
        x.double(), x.shape[1:], weight.double(), bias.double(), EPS
    )


def tolerance(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    spread = (x.double().var(1, correction=0, keepdim=True) + EPS).sqrt()
    return TOLERANCE * (x.abs().amax(1, keepdim=True) / spread * weight.abs() + bias.abs())


@pytest.mark.parametrize("shape", [(1, 1), (1, 576), (3, 33), (40, 2048)], ids=str)
@pytest.mark.usefixtures("isa")
def test_rows_are_centred_and_divided_by_their_deviation(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator) + 0.5
    weight, bias = torch.randn(2, shape[1], generator=generator)
    error = (layer_norm(x, weight, bias, EPS) - by_definition(x, weight, bias)).abs()
    assert (error <= tolerance(x, weight, bias)).all()


def test_one_step_of_a_bfloat16_input_exceeds_the_tolerance(generator: torch.Generator) -> None:
    x = torch.randn(4, 64, generator=generator).bfloat16()
    weight, bias = torch.ones(64), torch.zeros(64)
    right = layer_norm(x.float(), weight, bias, EPS)
    x.view(torch.int16)[2, 9] += 1
    wrong = layer_norm(x.float(), weight, bias, EPS)
    assert ((wrong - right).abs() > tolerance(x.float(), weight, bias))[2, 9]


@pytest.mark.usefixtures("isa")
def test_a_residual_takes_the_sum_and_its_norm_comes_out(generator: torch.Generator) -> None:
    wide = torch.randn(5, 100, generator=generator)
    x, residual = wide[:, 10:70], torch.randn(5, 60, generator=generator)
    weight, expected_sum = torch.randn(60, generator=generator), x + residual
    y = layer_norm(x, weight, None, EPS, residual=residual)
    assert torch.equal(residual, expected_sum)
    assert torch.equal(y, layer_norm(expected_sum, weight, torch.zeros(60), EPS))


@pytest.mark.usefixtures("isa")
def test_a_row_alone_and_in_a_batch_has_the_same_bits(generator: torch.Generator) -> None:
    x = torch.randn(70, 576, generator=generator)
    weight, bias = torch.randn(2, 576, generator=generator)
    together = layer_norm(x, weight, bias, EPS, out=x.clone())
    for row in range(70):
        assert torch.equal(layer_norm(x[row : row + 1], weight, bias, EPS)[0], together[row])


def test_the_reference_computes_the_definition(generator: torch.Generator) -> None:
    x, out = torch.randn(3, 40, generator=generator), torch.empty(3, 40)
    weight, bias = torch.randn(2, 40, generator=generator)
    reference.layer_norm(x, weight, bias, EPS, None, out)
    assert ((out - by_definition(x, weight, bias)).abs() <= tolerance(x, weight, bias)).all()


@pytest.mark.parametrize(
    ("bias", "error"),
    [(torch.zeros(9), ValueError), (torch.zeros(8).half(), TypeError)],
    ids=["shape", "dtype"],
)
def test_a_bias_that_does_not_fit_is_refused(bias: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        layer_norm(torch.zeros(2, 8), torch.ones(8), bias, EPS)
