"""The matmul with float weights: native kernels of every instruction set against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.backend import Backend
from qserve.kernels.dense_matmul import dense_matmul, prepare

Bound = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 16, 32), (3, 24, 33), (7, 70, 100), (17, 40, 160), (13, 1, 5), (2, 64, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_the_native_product_is_that_of_the_reference(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    product_bound: Bound,
    generator: torch.Generator,
) -> None:
    num_rows, num_outputs, num_inputs = shape
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    packed = prepare(weight)
    assert packed.backend is Backend.CPU
    y = dense_matmul(x, packed)
    assert ((y - x @ weight.float().T).abs() <= product_bound(x, weight.float())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa", "restored_threads")
def test_a_row_alone_and_in_a_batch_has_the_same_bits_on_any_number_of_threads(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    packed = prepare(torch.randn(200, 96, generator=generator).to(dtype))
    x = torch.randn(29, 96, generator=generator)
    native.set_num_threads(2)
    together = dense_matmul(x, packed)
    native.set_num_threads(1)
    for row in range(29):
        assert torch.equal(dense_matmul(x[row : row + 1], packed)[0], together[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_stay_sixteen_bit(dtype: torch.dtype) -> None:
    assert prepare(torch.zeros(64, 96, dtype=dtype)).nbytes == 64 * 96 * 2


@pytest.mark.usefixtures("isa")
def test_float16_values_are_read_exactly() -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = numbers[numbers.isfinite()].reshape(-1, 1)
    products = dense_matmul(torch.ones(1, 1), prepare(finite))
    assert torch.equal(products[0], finite[:, 0].float())


@pytest.mark.usefixtures("isa")
def test_infinities_and_nan_of_float16_come_through() -> None:
    weight = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]], dtype=torch.float16)
    y = dense_matmul(torch.ones(1, 1), prepare(weight))[0]
    assert y[0] == torch.inf and y[1] == -torch.inf and y[2].isnan()


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (torch.zeros(4, 4, dtype=torch.int8), TypeError),
        (torch.zeros(4, 4, dtype=torch.float64), TypeError),
        (torch.zeros(4), ValueError),
    ],
    ids=["int8", "float64", "one dimension"],
)
def test_weights_that_do_not_fit_are_refused(weight: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        prepare(weight)


def test_inputs_that_do_not_fit_are_refused() -> None:
    packed = prepare(torch.zeros(8, 64))
    with pytest.raises(ValueError, match="expected"):
        dense_matmul(torch.zeros(1, 63), packed)
    with pytest.raises(TypeError, match="float32"):
        dense_matmul(torch.zeros(1, 64, dtype=torch.bfloat16), packed)
