"""The Triton rounding of rows gives the values and scales of its definition, to the bit."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels import activations as definition
from qserve.kernels.activations import Activations
from qserve.kernels.quantize_tokens.kernel import quantize_tokens

DTYPES = (torch.float16, torch.bfloat16)


def make_rows(num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that span magnitudes, with ties between two codes, and one of zeros."""
    x = torch.randn(4, num_inputs, generator=torch.Generator().manual_seed(num_inputs))
    x[1] *= 2.0 ** -torch.arange(num_inputs).remainder(14)
    x[2] = torch.arange(num_inputs) % 255 / 2 - 63.5
    x[3] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_inputs", [128, 1200])
def test_int8_codes_are_those_of_the_definition(num_inputs: int, dtype: torch.dtype) -> None:
    x = make_rows(num_inputs, dtype)
    expected, scales = definition.quantize_tokens(x)
    found, found_scales = quantize_tokens(x, Activations.INT8_TOKEN, torch.int8)
    assert torch.equal(found[:, :num_inputs], expected)
    assert not found[:, num_inputs:].any()
    assert torch.equal(found_scales, scales.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_values_are_those_of_the_definition(dtype: torch.dtype) -> None:
    x = make_rows(1200, dtype)
    expected, scales = definition.quantize_tokens_float8(x)
    found, found_scales = quantize_tokens(x, Activations.FLOAT8_TOKEN, torch.float8_e4m3fn)
    assert torch.equal(found[:, :1200].float(), expected.float())
    assert torch.equal(found_scales, scales)


def test_fnuz_floats_have_the_same_bits_and_twice_the_scale() -> None:
    x = make_rows(128, torch.float16)
    expected, scales = definition.quantize_tokens_float8(x)
    found, found_scales = quantize_tokens(x, Activations.FLOAT8_TOKEN, torch.float8_e4m3fnuz)
    assert torch.equal(found.float() * 2, expected.float())
    assert torch.equal(found_scales, scales * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", [Activations.INT8_TOKEN, Activations.FLOAT8_TOKEN])
def test_sixteen_bits_hold_every_value(activations: Activations, dtype: torch.dtype) -> None:
    x = make_rows(128, dtype)
    values, scales = quantize_tokens(x, activations, dtype)
    rounded = definition.round_activations(x, activations)
    assert torch.equal(values.float() * scales[:, None], rounded)


def test_planar_rows_are_in_the_order_of_the_nibbles() -> None:
    x = make_rows(256, torch.float16)
    plain, _ = quantize_tokens(x, Activations.INT8_TOKEN, torch.int8)
    planar, _ = quantize_tokens(x, Activations.INT8_TOKEN, torch.int8, planar=True)
    for place in range(256):
        block, rest = divmod(place, 128)
        upper, byte = divmod(rest, 64)
        container, plane_pair = divmod(byte, 2)
        source = 128 * block + 32 * (2 * plane_pair + upper) + container
        assert torch.equal(planar[:, place], plain[:, source])
