"""The Triton int8 matmul agrees with its definition, with float and with integer rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qserve.kernels.activations import Activations, quantize_tokens
from qserve.kernels.gpu_target import TARGETS
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int8_matmul import kernel

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16)
NUM_OUTPUTS = 70  # a tile of 64 and a part of one
ASSEMBLY, PLAIN = TARGETS["sm_80"], TARGETS["gfx942"]


def make_weight(num_inputs: int, group_size: int, asymmetric: bool = False) -> GroupedWeight:
    """A random weight whose codes and zero points use all values."""
    generator = torch.Generator().manual_seed(num_inputs + group_size)
    groups = (NUM_OUTPUTS, num_inputs // group_size)
    zero_points = torch.full(groups, 128).byte()
    if asymmetric:
        zero_points = torch.randint(0, 256, groups, generator=generator).byte()
    return GroupedWeight(
        codes=torch.randint(0, 256, (NUM_OUTPUTS, num_inputs), generator=generator).byte(),
        scales=(0.001 + 0.002 * torch.rand(groups, generator=generator)).half(),
        zero_points=zero_points,
        bits=8,
        group_size=group_size,
    )


def make_rows(num_rows: int, num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, num_inputs, generator=generator).to(dtype)


def run_product(
    x: torch.Tensor,
    weight: GroupedWeight,
    bias: torch.Tensor | None = None,
    activations: Activations = Activations.FLOAT32,
) -> torch.Tensor:
    """The product in a matrix full of NaN: what the kernel does not write cannot pass."""
    out = torch.full((x.shape[0], weight.out_features), float("nan"), dtype=x.dtype)
    kernel.prepare(weight, CPU, bias).run(x, out, activations)
    return out


def is_close(
    out: torch.Tensor, x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | float = 0.0
) -> bool:
    """Whether ``out`` is the product: exact to 2^-20, then rounded once to its dtype."""
    dense = weight.dequantize().double()
    expected = x.double() @ dense.T + bias
    magnitude = x.double().abs() @ dense.abs().T
    allowed = torch.finfo(out.dtype).eps / 2 * expected.abs() + 2**-20 * magnitude
    return bool(((out.double() - expected).abs() <= allowed).all())


def round_rows(x: torch.Tensor) -> torch.Tensor:
    codes, scales = quantize_tokens(x)
    return codes.double() * scales.double()[:, None]


@pytest.fixture(params=[ASSEMBLY, PLAIN], ids=["assembly", "plain"], autouse=True)
def _target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "gpu_target", lambda _: request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("num_inputs", "group_size"), [(128, 32), (160, 160), (256, 128)])
def test_the_kernel_computes_what_the_weight_stands_for(
    num_inputs: int, group_size: int, asymmetric: bool, dtype: torch.dtype
) -> None:
    weight = make_weight(num_inputs, group_size, asymmetric)
    x = make_rows(3, num_inputs, dtype)
    assert is_close(run_product(x, weight), x, weight)


@pytest.mark.parametrize(("num_inputs", "group_size"), [(128, 64), (160, 160)])
def test_int8_rows_are_multiplied_as_integers(num_inputs: int, group_size: int) -> None:
    weight = make_weight(num_inputs, group_size)
    x = make_rows(3, num_inputs, torch.bfloat16)
    out = run_product(x, weight, activations=Activations.INT8_TOKEN)
    assert is_close(out, round_rows(x), weight)
    assert not is_close(out, x, weight)


def test_zero_points_take_int8_rows_as_floats() -> None:
    weight = make_weight(128, 128, asymmetric=True)
    x = make_rows(3, 128, torch.float16)
    out = run_product(x, weight, activations=Activations.INT8_TOKEN)
    assert is_close(out, round_rows(x), weight)


@pytest.mark.parametrize("group_size", [128, 64])
def test_inputs_out_of_order_outer_scales_and_a_bias_are_followed(group_size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = replace(
        make_weight(128, group_size),
        input_order=torch.randperm(128, generator=generator),
        channel_scales=0.5 + torch.rand(NUM_OUTPUTS, generator=generator),
    )
    x = make_rows(3, 128, torch.float16)
    bias = torch.linspace(-9, 9, NUM_OUTPUTS)
    assert is_close(run_product(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("group_size", [32, 128])
def test_a_code_off_by_one_step_is_noticed(group_size: int) -> None:
    weight = make_weight(128, group_size)
    x = make_rows(3, 128, torch.float16)
    codes = weight.codes.clone()
    codes[69, 127] ^= 1
    assert not is_close(run_product(x, replace(weight, codes=codes)), x, weight)
