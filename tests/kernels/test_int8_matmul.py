"""The 8-bit matmul: rounding of a weight, and native kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.activations import round_rows
from qserve.kernels.backend import Backend
from qserve.kernels.int8_matmul import (
    Activations,
    int8_matmul,
    prepare,
    quantize_int8,
    round_weight,
)

Bound = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# (rows, outputs, inputs, group size); inputs need not fill a group, nor four of them a quad.
SHAPES = [
    (1, 16, 64, 64),
    (3, 24, 100, 64),
    (17, 40, 33, 32),
    (5, 130, 7, 32),
    (9, 64, 576, 128),
    (2, 20, 1, 96),
]


def dense(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    return codes.float() * scales.repeat_interleave(group_size, 1)[:, : codes.shape[1]]


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
    codes, scales = round_weight(
        torch.randn(num_outputs, num_inputs, generator=generator), group_size
    )
    x = torch.randn(num_rows, num_inputs, generator=generator)
    packed = prepare(codes, scales, group_size)
    assert packed.backend is Backend.CPU
    y = int8_matmul(x, packed, activations=activations)
    a = round_rows(x) if activations is Activations.INT8 else x
    weight = dense(codes, scales, group_size)
    assert ((y - a @ weight.T).abs() <= product_bound(a, weight)).all()


@pytest.mark.usefixtures("isa")
def test_extreme_codes_and_inputs_do_not_saturate(product_bound: Bound) -> None:
    signs = torch.tensor([1, -1], dtype=torch.int8)
    codes = (127 * signs).repeat(16, 64)
    codes[8:] = 127
    x = torch.full((3, 128), 2.0)
    x[1, 1::2] = -2.0
    x[2] = -2.0
    packed = prepare(codes, torch.ones(16, 2), 64)
    a = round_rows(x)
    y = int8_matmul(x, packed)
    assert ((y - a @ codes.float().T).abs() <= product_bound(a, codes.float())).all()


def test_one_step_of_a_code_exceeds_the_tolerance(
    product_bound: Bound, generator: torch.Generator
) -> None:
    codes, scales = round_weight(torch.randn(24, 128, generator=generator), 64)
    x = torch.randn(2, 128, generator=generator) + 1.0
    right = int8_matmul(x, prepare(codes, scales, 64))
    codes[7, 3] += 1 if codes[7, 3] < 127 else -1
    wrong = int8_matmul(x, prepare(codes, scales, 64))
    assert ((wrong - right).abs() > product_bound(round_rows(x), dense(codes, scales, 64)))[
        :, 7
    ].any()


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.usefixtures("isa", "restored_threads")
def test_a_row_alone_and_in_a_batch_has_the_same_bits_on_any_number_of_threads(
    activations: Activations, generator: torch.Generator
) -> None:
    packed = quantize_int8(torch.randn(520, 100, generator=generator))
    x = torch.randn(19, 100, generator=generator)
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
    weight = torch.randn(10, 100, generator=generator).to(dtype)
    codes, scales = round_weight(weight, 64)
    steps = scales.repeat_interleave(64, 1)[:, :100]
    # Scales are rounded to float16: the largest code may have to stop at 127, 2^-11 of it short.
    slack = steps * (0.5 + 127 * 2.0**-11)
    assert codes.dtype is torch.int8 and scales.shape == (10, 2)
    assert ((weight.float() - dense(codes, scales, 64)).abs() <= slack).all()
    assert torch.equal(scales, scales.half().float())


def test_scales_outside_float16_stay_float32(generator: torch.Generator) -> None:
    weight = torch.randn(4, 64, generator=generator) * 1e-8
    weight[0] = 0
    codes, scales = round_weight(weight, 64)
    assert not codes[0].any()
    assert torch.allclose(dense(codes, scales, 64), weight, rtol=0, atol=float(scales.max()) / 2)


def test_nan_shows_in_its_row(isa: str, generator: torch.Generator) -> None:
    packed = quantize_int8(torch.randn(24, 96, generator=generator))
    x = torch.randn(4, 96, generator=generator)
    x[2, 95] = torch.nan
    y = int8_matmul(x, packed)
    assert y[2].isnan().all(), isa
    assert y[[0, 1, 3]].isfinite().all(), isa


@pytest.mark.parametrize(
    ("codes", "scales", "error"),
    [
        (torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1), TypeError),
        (torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1, dtype=torch.int32), TypeError),
        (torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2), ValueError),
        (torch.zeros(64, dtype=torch.int8), torch.ones(1), ValueError),
        (torch.full((4, 64), -128, dtype=torch.int8), torch.ones(4, 1), ValueError),
    ],
    ids=["unsigned", "integer scales", "too many scales", "one dimension", "code -128"],
)
def test_codes_that_do_not_fit_are_refused(
    codes: torch.Tensor, scales: torch.Tensor, error: type[Exception]
) -> None:
    with pytest.raises(error, match="expected"):
        prepare(codes, scales, 64)


def test_inputs_that_do_not_fit_are_refused(generator: torch.Generator) -> None:
    packed = quantize_int8(torch.randn(8, 64, generator=generator))
    with pytest.raises(ValueError, match="expected"):
        int8_matmul(torch.zeros(1, 63), packed)
    with pytest.raises(TypeError, match="float32"):
        int8_matmul(torch.zeros(1, 64, dtype=torch.float16), packed)
