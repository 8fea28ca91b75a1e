"""Weights of every neutral form prepared by one call, with and without a bias."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qserve.kernels.activations import Activations, round_activations
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int8_matmul import round_weight
from qserve.kernels.linear_weight import NeutralWeight, prepare_linear, shape_of
from qserve.kernels.packed_weight import multiply

OUTPUTS, INPUTS = 24, 64
Bound = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make(form: str, generator: torch.Generator) -> tuple[NeutralWeight, torch.Tensor]:
    """A random weight of a form, and the floats it stands for."""
    dense = torch.randn(OUTPUTS, INPUTS, generator=generator)
    codes = torch.randint(0, 16, dense.shape, generator=generator, dtype=torch.uint8)
    weight: GroupedWeight | CodebookWeight | Float8Weight
    if form == "float":
        return dense, dense
    if form == "int8":
        weight = round_weight(dense, 32)
    elif form == "int4":
        weight = GroupedWeight(codes, torch.ones(OUTPUTS, 2), codes[:, :2], 4, 32)
    elif form == "codebook":
        weight = CodebookWeight(codes, torch.linspace(-1, 1, 16), torch.ones(OUTPUTS), INPUTS)
    else:
        values = dense.to(torch.float8_e4m3fn)
        weight = Float8Weight(values, torch.full((1, 1), 0.25), (OUTPUTS, INPUTS))
    return weight, weight.dequantize()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["float", "int8", "int4", "codebook", "float8"])
def test_every_form_is_multiplied_by_the_matmul_of_its_format(
    form: str, biased: bool, generator: torch.Generator, product_bound: Bound
) -> None:
    weight, dense = make(form, generator)
    bias = torch.randn(OUTPUTS, generator=generator) if biased else None
    x = torch.randn(3, INPUTS, generator=generator)
    assert shape_of(weight) == (OUTPUTS, INPUTS)
    y = multiply(x, prepare_linear(weight, bias=bias), activations=Activations.FLOAT32)
    expected = x @ dense.T + (0 if bias is None else bias)
    assert ((y - expected).abs() <= product_bound(x, dense) + 1e-6).all()


@pytest.mark.parametrize("form", ["float", "int8", "int4", "codebook", "float8"])
def test_a_bias_of_another_length_is_refused(form: str, generator: torch.Generator) -> None:
    weight, _ = make(form, generator)
    with pytest.raises(ValueError, match="bias"):
        prepare_linear(weight, bias=torch.zeros(OUTPUTS + 1))


def test_activations_of_a_float_weight_are_never_rounded(generator: torch.Generator) -> None:
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    x = torch.randn(2, INPUTS, generator=generator)
    packed = prepare_linear(weight)
    exact = multiply(x, packed)
    assert torch.equal(multiply(x, packed, activations=Activations.INT8), exact)
    assert not torch.equal(round_activations(x, Activations.INT8), x)
