"""The 4-bit matmul: native kernels of every instruction set against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.activations import ACTIVATION_GROUP, quantize_rows, round_activations
from qserve.kernels.backend import Backend
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul import Activations, int4_matmul, prepare

MakeWeight = Callable[..., GroupedWeight]
Bound = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# (rows, outputs, inputs, group size): single rows, every remainder of a block of 8 rows, outputs
# that do not fill a panel of 16, groups of one, two, three and four times 32.
SHAPES = [
    (1, 16, 32, 32),
    (1, 24, 96, 32),
    (3, 40, 160, 32),
    (17, 40, 192, 64),
    (7, 1, 128, 128),
    (6, 33, 192, 96),
    (8, 64, 256, 128),
    (21, 100, 576, 64),
]


def round_rows(x: torch.Tensor) -> torch.Tensor:
    return round_activations(x, Activations.INT8)


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_the_native_product_is_that_of_the_dequantized_weight(
    shape: tuple[int, int, int, int],
    activations: Activations,
    make_weight: MakeWeight,
    product_bound: Bound,
    generator: torch.Generator,
) -> None:
    num_rows, *rest = shape
    weight = make_weight(*rest)
    x = torch.randn(num_rows, weight.in_features, generator=generator)
    packed = prepare(weight)
    assert packed.backend is Backend.CPU
    y = int4_matmul(x, packed, activations=activations)
    a, dense = round_activations(x, activations), weight.dequantize()
    assert ((y - a @ dense.T).abs() <= product_bound(a, dense)).all()


@pytest.mark.parametrize("part", ["codes", "zero_points"])
@pytest.mark.parametrize("activations", Activations)
def test_one_step_of_a_code_or_zero_point_exceeds_the_tolerance(
    part: str,
    activations: Activations,
    make_weight: MakeWeight,
    product_bound: Bound,
    generator: torch.Generator,
) -> None:
    weight = make_weight(24, 160, 32)
    x = torch.randn(3, 160, generator=generator) + 0.5
    right = int4_matmul(x, prepare(weight), activations=activations)
    numbers = getattr(weight, part)
    numbers[5, 2] += 1 if numbers[5, 2] < 15 else -1
    wrong = int4_matmul(x, prepare(weight), activations=activations)
    a = round_activations(x, activations)
    exceeded = (wrong - right).abs() > product_bound(a, weight.dequantize())
    assert exceeded[:, 5].any()
    assert not exceeded[:, torch.arange(24) != 5].any()


@pytest.mark.parametrize("zero_point", [0, 15])
@pytest.mark.usefixtures("isa")
def test_extreme_zero_points_and_codes_do_not_overflow(
    zero_point: int, make_weight: MakeWeight, product_bound: Bound
) -> None:
    weight = make_weight(16, 128, 128)
    weight.zero_points.fill_(zero_point)
    weight.codes.fill_(15 - zero_point)
    x = torch.full((2, 128), 3.0)
    x[1] = -3.0
    a, dense = round_rows(x), weight.dequantize()
    y = int4_matmul(x, prepare(weight))
    assert ((y - a @ dense.T).abs() <= product_bound(a, dense)).all()


@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e7])
@pytest.mark.usefixtures("isa")
def test_scales_beyond_float16_are_kept(
    factor: float, make_weight: MakeWeight, product_bound: Bound, generator: torch.Generator
) -> None:
    weight = make_weight(24, 96, 32, torch.float32)
    weight.scales.mul_(factor)
    x = torch.randn(2, 96, generator=generator)
    y = int4_matmul(x, prepare(weight))
    a, dense = round_rows(x), weight.dequantize()
    assert ((y - a @ dense.T).abs() <= product_bound(a, dense)).all()


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.usefixtures("isa")
def test_a_row_alone_and_in_a_batch_has_the_same_bits(
    activations: Activations, make_weight: MakeWeight, generator: torch.Generator
) -> None:
    packed = prepare(make_weight(40, 192, 64))
    x = torch.randn(23, 192, generator=generator)
    together = int4_matmul(x, packed, activations=activations)
    for row in range(23):
        alone = int4_matmul(x[row : row + 1], packed, activations=activations)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("num_rows", [1, 150, 520])
@pytest.mark.usefixtures("isa", "restored_threads")
def test_the_number_of_threads_does_not_change_a_bit(
    num_rows: int, make_weight: MakeWeight, generator: torch.Generator
) -> None:
    packed = prepare(make_weight(312, 192, 64))
    x = torch.randn(num_rows, 192, generator=generator)
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        results.append(int4_matmul(x, packed))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("isa")
def test_int8_activations_stay_within_half_a_step_of_exact_ones(
    make_weight: MakeWeight, product_bound: Bound, generator: torch.Generator
) -> None:
    weight = make_weight(40, 192, 64)
    packed, dense = prepare(weight), weight.dequantize()
    x = torch.randn(5, 192, generator=generator)
    rounded = int4_matmul(x, packed)
    exact = int4_matmul(x, packed, activations=Activations.FLOAT32)
    half_steps = quantize_rows(x)[1].repeat_interleave(ACTIVATION_GROUP, 1) / 2
    limit = half_steps @ dense.abs().T + product_bound(x, dense)
    assert ((rounded - exact).abs() <= limit).all()
    assert not torch.equal(rounded, exact)


@pytest.mark.usefixtures("isa")
def test_slices_of_wider_matrices_are_read_and_written_in_place(
    make_weight: MakeWeight, generator: torch.Generator
) -> None:
    packed = prepare(make_weight(24, 96, 32))
    wide_x, wide_out = torch.randn(5, 200, generator=generator), torch.full((5, 64), 7.0)
    x, out = wide_x[:, 50:146], wide_out[:, 20:44]
    assert int4_matmul(x, packed, out=out) is out
    assert torch.equal(out, int4_matmul(x.contiguous(), packed))
    assert (wide_out[:, :20] == 7).all() and (wide_out[:, 44:] == 7).all()


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.usefixtures("isa")
def test_a_nan_shows_in_its_row_and_no_other(
    activations: Activations, make_weight: MakeWeight, generator: torch.Generator
) -> None:
    packed = prepare(make_weight(24, 96, 32))
    x = torch.randn(9, 96, generator=generator)
    x[4, 40] = torch.nan
    y = int4_matmul(x, packed, activations=activations)
    assert y[4].isnan().all()
    assert torch.cat([y[:4], y[5:]]).isfinite().all()


@pytest.mark.usefixtures("isa")
def test_a_row_of_zeros_gives_zeros_and_no_rows_give_none(make_weight: MakeWeight) -> None:
    packed = prepare(make_weight(24, 96, 32))
    assert not int4_matmul(torch.zeros(1, 96), packed).any()
    assert int4_matmul(torch.zeros(0, 96), packed).shape == (0, 24)


def test_groups_that_are_no_multiple_of_32_run_on_the_reference(
    make_weight: MakeWeight, product_bound: Bound, generator: torch.Generator
) -> None:
    weight = make_weight(8, 40, 8)
    packed = prepare(weight)
    x = torch.randn(2, 40, generator=generator)
    assert packed.backend is Backend.REFERENCE
    y, a, dense = int4_matmul(x, packed), round_rows(x), weight.dequantize()
    assert ((y - a @ dense.T).abs() <= product_bound(a, dense)).all()


def test_eight_bits_are_refused(make_weight: MakeWeight) -> None:
    weight = make_weight(16, 32, 32)
    wide = GroupedWeight(weight.codes, weight.scales, weight.zero_points, 8, 32)
    with pytest.raises(ValueError, match="8 bits"):
        prepare(wide)


@pytest.mark.parametrize(
    ("x", "out", "error"),
    [
        (torch.zeros(2, 95), None, ValueError),
        (torch.zeros(96), None, ValueError),
        (torch.zeros(96, 2).T, None, ValueError),
        (torch.zeros(2, 96, dtype=torch.float64), None, TypeError),
        (torch.zeros(2, 96, dtype=torch.bfloat16), None, TypeError),
        (torch.zeros(2, 96, dtype=torch.int32), None, TypeError),
        (torch.zeros(2, 96), torch.zeros(2, 23), ValueError),
        (torch.zeros(2, 96), torch.zeros(3, 24), ValueError),
        (torch.zeros(2, 96), torch.zeros(24, 2).T, ValueError),
        (torch.zeros(2, 96), torch.zeros(2, 24, dtype=torch.float16), TypeError),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(
    x: torch.Tensor, out: torch.Tensor | None, error: type[Exception], make_weight: MakeWeight
) -> None:
    with pytest.raises(error, match="expected"):
        int4_matmul(x, prepare(make_weight(24, 96, 32)), out=out)
