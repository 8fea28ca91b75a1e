"""The Triton float8 matmul agrees with its definition, with float8 in hardware and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qserve.kernels.activations import Activations, round_activations
from qserve.kernels.float8_matmul import kernel
from qserve.kernels.float8_matmul.launch import float8_launch
from qserve.kernels.float8_matmul.layout import pack_float8
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.gpu_target import TARGETS, GpuTarget
from qserve.kernels.tiled_matmul.kernel import TiledProduct, TiledWeight, run
from qserve.kernels.tiled_matmul.launch import MatmulProblem

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16)
NUM_OUTPUTS = 70  # a tile of 64 and a part of one
BITS, NATIVE, HALVED = (TARGETS[name] for name in ("sm_80", "sm_90", "gfx942"))

every_target = pytest.mark.parametrize("target", [BITS, NATIVE, HALVED], ids=lambda t: t.name)


def make_weight(num_inputs: int, block: tuple[int, int]) -> Float8Weight:
    """A weight that has every finite float8, subnormals and zeros of both signs among them."""
    finite = [code for code in range(256) if code & 127 != 127]
    codes = torch.tensor(finite, dtype=torch.uint8).repeat(-(-NUM_OUTPUTS * num_inputs // 254))
    values = codes[: NUM_OUTPUTS * num_inputs].reshape(num_inputs, NUM_OUTPUTS).T.contiguous()
    shape = (-(-NUM_OUTPUTS // block[0]), -(-num_inputs // block[1]))
    generator = torch.Generator().manual_seed(num_inputs)
    scales = 0.001 + 0.002 * torch.rand(shape, generator=generator)
    return Float8Weight(values.view(torch.float8_e4m3fn), scales, block)


def make_rows(num_rows: int, num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, num_inputs, generator=generator).to(dtype)


def is_close(
    out: torch.Tensor, x: torch.Tensor, weight: Float8Weight, bias: torch.Tensor | float = 0.0
) -> bool:
    """Whether ``out`` is the product: exact to 2^-20, then rounded once to its dtype."""
    dense = weight.dequantize().double()
    expected = x.double() @ dense.T + bias
    magnitude = x.double().abs() @ dense.abs().T
    allowed = torch.finfo(out.dtype).eps / 2 * expected.abs() + 2**-20 * magnitude
    return bool(((out.double() - expected).abs() <= allowed).all())


def run_product(product: kernel.Float8Product, x: torch.Tensor, how: Activations) -> torch.Tensor:
    out = torch.full((x.shape[0], NUM_OUTPUTS), float("nan"), dtype=x.dtype)
    run(product.arrange(x, how), out)
    return out


@every_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_inputs", "block"), [(160, (NUM_OUTPUTS, 160)), (128, (1, 128)), (256, (32, 128))]
)
def test_sixteen_bit_rows_are_multiplied_with_what_the_weight_stands_for(
    num_inputs: int, block: tuple[int, int], dtype: torch.dtype, target: GpuTarget
) -> None:
    weight = make_weight(num_inputs, block)
    bias = torch.linspace(-9, 9, NUM_OUTPUTS)
    x = make_rows(3, num_inputs, dtype)
    product = kernel.Float8Product(weight, CPU, target, bias)
    assert is_close(run_product(product, x, Activations.FLOAT32), x, weight, bias)


@every_target
@pytest.mark.parametrize(("num_inputs", "block"), [(160, (1, 160)), (256, (64, 64))])
def test_rows_are_rounded_to_float8(
    num_inputs: int, block: tuple[int, int], target: GpuTarget
) -> None:
    weight = make_weight(num_inputs, block)
    x = make_rows(3, num_inputs, torch.float16)
    product = kernel.Float8Product(weight, CPU, target)
    out = run_product(product, x, Activations.FLOAT8_TOKEN)
    assert is_close(out, round_activations(x, Activations.FLOAT8_TOKEN), weight)
    assert not is_close(out, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_unpacked_without_assembly_too(dtype: torch.dtype) -> None:
    weight = make_weight(128, (1, 128))
    x = make_rows(3, 128, dtype)
    launch = float8_launch(MatmulProblem(3, NUM_OUTPUTS, 128, 0, dtype), BITS)
    launch = replace(launch, format=replace(launch.format, assembly=False))
    packed = pack_float8(weight, torch.int8)
    out = torch.full((3, NUM_OUTPUTS), float("nan"), dtype=dtype)
    tiled = TiledWeight(packed.values, None, packed.channel_scales)
    run(TiledProduct(x, tiled, launch, kernel.sum_blocks), out)
    assert is_close(out, x, weight)


@every_target
def test_a_value_off_by_one_step_is_noticed(target: GpuTarget) -> None:
    weight = make_weight(128, (1, 128))
    values = weight.values.clone().view(torch.uint8)
    values[69, 127] = 0x48  # of magnitude 4
    right = replace(weight, values=values.view(torch.float8_e4m3fn))
    values = values.clone()
    values[69, 127] ^= 1
    wrong = replace(weight, values=values.view(torch.float8_e4m3fn))
    x = torch.zeros(3, 128, dtype=torch.float16)
    x[:, ::9] = make_rows(3, 15, torch.float16)
    x[:, 127] = 1.0
    product = kernel.Float8Product(wrong, CPU, target)
    assert not is_close(run_product(product, x, Activations.FLOAT32), x, right)
