"""The Triton codebook matmul agrees with its definition, looked up by assembly and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qserve.kernels.activations import Activations
from qserve.kernels.codebook_matmul import kernel
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.gpu_target import TARGETS

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16)
NUM_OUTPUTS = 70  # a tile of 64 and a part of one
CODEBOOK = torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16) ** 2


def make_weight(num_inputs: int, block_size: int) -> CodebookWeight:
    generator = torch.Generator().manual_seed(num_inputs + block_size)
    num_blocks = -(-NUM_OUTPUTS * num_inputs // block_size)
    return CodebookWeight(
        codes=torch.randint(0, 16, (NUM_OUTPUTS, num_inputs), generator=generator).byte(),
        codebook=CODEBOOK,
        block_scales=0.01 + 0.02 * torch.rand(num_blocks, generator=generator),
        block_size=block_size,
    )


def make_rows(num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_inputs)
    return torch.randn(3, num_inputs, generator=generator).to(dtype)


def run_product(
    x: torch.Tensor, weight: CodebookWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The product in a matrix full of NaN: what the kernel does not write cannot pass."""
    out = torch.full((x.shape[0], NUM_OUTPUTS), float("nan"), dtype=x.dtype)
    kernel.prepare(weight, CPU, bias).run(x, out, Activations.FLOAT32)
    return out


def is_close(
    out: torch.Tensor, x: torch.Tensor, weight: CodebookWeight, bias: torch.Tensor | float = 0.0
) -> bool:
    """Whether ``out`` is the product with the codebook rounded to the dtype of the rows: exact to
    2^-20, then rounded once."""
    dense = replace(weight, codebook=weight.codebook.to(x.dtype).float()).dequantize().double()
    expected = x.double() @ dense.T + bias
    magnitude = x.double().abs() @ dense.abs().T
    allowed = torch.finfo(out.dtype).eps / 2 * expected.abs() + 2**-20 * magnitude
    return bool(((out.double() - expected).abs() <= allowed).all())


@pytest.fixture(params=["sm_80", "gfx942"], autouse=True)
def _target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "gpu_target", lambda _: TARGETS[request.param])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_inputs", "block_size"), [(160, 64), (192, 64), (128, 256)])
def test_the_kernel_computes_what_the_weight_stands_for(
    num_inputs: int, block_size: int, dtype: torch.dtype
) -> None:
    weight = make_weight(num_inputs, block_size)
    x = make_rows(num_inputs, dtype)
    bias = torch.linspace(-9, 9, NUM_OUTPUTS)
    assert is_close(run_product(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_code_off_by_one_step_is_noticed(dtype: torch.dtype) -> None:
    weight = make_weight(128, 64)
    codes = weight.codes.clone()
    codes[69, 127] ^= 8
    x = make_rows(128, dtype)
    assert not is_close(run_product(x, replace(weight, codes=codes)), x, weight)


def test_runs_shorter_than_a_plane_are_refused() -> None:
    with pytest.raises(ValueError, match="runs of at least 32"):
        kernel.prepare(make_weight(80, 64), CPU)
