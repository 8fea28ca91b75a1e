"""The Triton matmul with float weights agrees with its definition, also with rows of another
dtype."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.activations import Activations
from qserve.kernels.dense_matmul import kernel
from qserve.kernels.gpu_target import TARGETS

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16)
NUM_OUTPUTS = 70  # a tile of 64 and a part of one


@pytest.fixture(autouse=True)
def _target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "gpu_target", lambda _: TARGETS["sm_80"])


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def run_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The product in a matrix full of NaN: what the kernel does not write cannot pass."""
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype)
    kernel.prepare(weight, CPU, bias).run(x, out, Activations.INT8)
    return out


def is_close(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | float = 0.0
) -> bool:
    """Whether ``out`` is the product: exact to 2^-20, then rounded once to its dtype."""
    expected = x.double() @ weight.double().T + bias
    magnitude = x.double().abs() @ weight.double().abs().T
    allowed = torch.finfo(out.dtype).eps / 2 * expected.abs() + 2**-20 * magnitude
    return bool(((out.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_inputs", [128, 160, 7])
def test_the_kernel_computes_the_product(num_inputs: int, dtype: torch.dtype) -> None:
    weight, x = random(NUM_OUTPUTS, num_inputs, dtype=dtype), random(3, num_inputs, dtype=dtype)
    assert is_close(run_product(x, weight), x, weight)
    bias = torch.linspace(-9, 9, NUM_OUTPUTS)
    assert is_close(run_product(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_another_dtype_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    weight, x = random(NUM_OUTPUTS, 160, dtype=dtype), random(2, 160, dtype=torch.float16)
    assert is_close(run_product(x, weight), x, weight)


def test_a_weight_off_by_one_step_is_noticed() -> None:
    weight, x = random(NUM_OUTPUTS, 128, dtype=torch.float16), torch.eye(128).half()[:3]
    changed = weight.clone()
    changed[69, 2] = torch.nextafter(weight[69, 2], torch.tensor(9.0).half())
    assert not is_close(run_product(x, changed), x, weight)
