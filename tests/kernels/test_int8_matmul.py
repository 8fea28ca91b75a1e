"""The 8-bit matmul: rounding of a weight, and native kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.activations import round_activations
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int8_matmul import (
    Activations,
    int8_matmul,
    prepare,
    quantize_int8,
    round_weight,
)

Bound = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# (rows, outputs, inputs, group size); inputs need not fill a group of the activations, nor a quad.
SHAPES = [
    (1, 16, 64, 64),
    (3, 24, 100, 100),
    (17, 40, 33, 33),
    (5, 130, 7, 7),
    (9, 64, 640, 128),
    (2, 20, 1, 1),
    (4, 24, 80, 80),
]


def round_rows(x: torch.Tensor) -> torch.Tensor:
    return round_activations(x, Activations.INT8)


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_the_native_product_is_that_of_the_dequantized_weight(
    shape: tuple[int, int, int, int],
    activations: Activations,
    product_bound: Bound,
    generator: torch.Generator,
) -> None:
    num_rows, num_outputs, num_inputs, group_size = shape
    weight = round_weight(torch.randn(num_outputs, num_inputs, generator=generator), group_size)
    assert weight.group_size == group_size
    x = torch.randn(num_rows, num_inputs, generator=generator)
    y = int8_matmul(x, prepare(weight), activations=activations)
    a, dense = round_activations(x, activations), weight.dequantize()
    assert ((y - a @ dense.T).abs() <= product_bound(a, dense)).all()


@pytest.mark.usefixtures("isa")
def test_extreme_codes_and_inputs_do_not_saturate(product_bound: Bound) -> None:
    signs = torch.tensor([255, 1], dtype=torch.uint8)
    codes = signs.repeat(16, 64)
    codes[8:] = 255
    middle = torch.full((16, 2), 128, dtype=torch.uint8)
    weight = GroupedWeight(codes, torch.ones(16, 2), middle, 8, 64)
    x = torch.full((3, 128), 2.0)
    x[1, 1::2] = -2.0
    x[2] = -2.0
    a, dense = round_rows(x), weight.dequantize()
    y = int8_matmul(x, prepare(weight))
    assert ((y - a @ dense.T).abs() <= product_bound(a, dense)).all()


def test_one_step_of_a_code_exceeds_the_tolerance(
    product_bound: Bound, generator: torch.Generator
) -> None:
    weight = round_weight(torch.randn(24, 128, generator=generator), 64)
    x = torch.randn(2, 128, generator=generator) + 1.0
    right = int8_matmul(x, prepare(weight))
    weight.codes[7, 3] += 1 if weight.codes[7, 3] < 255 else -1
    wrong = int8_matmul(x, prepare(weight))
    exceeded = (wrong - right).abs() > product_bound(round_rows(x), weight.dequantize())
    assert exceeded[:, 7].any()


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.usefixtures("isa", "restored_threads")
def test_a_row_alone_and_in_a_batch_has_the_same_bits_on_any_number_of_threads(
    activations: Activations, generator: torch.Generator
) -> None:
    packed = quantize_int8(torch.randn(520, 96, generator=generator))
    x = torch.randn(19, 96, generator=generator)
    native.set_num_threads(2)
    together = int8_matmul(x, packed, activations=activations)
    native.set_num_threads(1)
    for row in range(19):
        alone = int8_matmul(x[row : row + 1], packed, activations=activations)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounded_weight_is_within_half_a_step(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = torch.randn(10, 96, generator=generator).to(dtype)
    rounded = round_weight(weight, 64)
    # Scales are rounded to float16: the largest code may have to stop at 127, 2^-11 of it short.
    slack = rounded.scales.repeat_interleave(32, 1) * (0.5 + 127 * 2.0**-11)
    assert rounded.codes.dtype is torch.uint8 and rounded.scales.shape == (10, 3)
    assert ((weight.float() - rounded.dequantize()).abs() <= slack).all()
    assert torch.equal(rounded.scales, rounded.scales.half().float())


def test_scales_outside_float16_stay_float32(generator: torch.Generator) -> None:
    weight = torch.randn(4, 64, generator=generator) * 1e-8
    weight[0] = 0
    rounded = round_weight(weight, 64)
    dense = rounded.dequantize()
    assert not dense[0].any()
    assert torch.allclose(dense, weight, rtol=0, atol=float(rounded.scales[1:].max()) / 2)


def test_nan_shows_in_its_row(isa: str, generator: torch.Generator) -> None:
    packed = quantize_int8(torch.randn(24, 96, generator=generator))
    x = torch.randn(4, 96, generator=generator)
    x[2, 95] = torch.nan
    y = int8_matmul(x, packed)
    assert y[2].isnan().all(), isa
    assert y[[0, 1, 3]].isfinite().all(), isa


def test_other_widths_are_refused(generator: torch.Generator) -> None:
    weight = round_weight(torch.randn(8, 64, generator=generator))
    narrow = GroupedWeight(weight.codes, weight.scales, weight.zero_points, 4, 64)
    with pytest.raises(ValueError, match="expected 8"):
        prepare(narrow)


def test_inputs_that_do_not_fit_are_refused(generator: torch.Generator) -> None:
    packed = quantize_int8(torch.randn(8, 64, generator=generator))
    with pytest.raises(ValueError, match="expected"):
        int8_matmul(torch.zeros(1, 63), packed)
    with pytest.raises(TypeError, match="float32"):
        int8_matmul(torch.zeros(1, 64, dtype=torch.float16), packed)
