"""The Triton int4 matmul agrees with its definition, in every variant a launch can ask for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import gcd

import pytest
import torch

from qserve.kernels.activations import Activations, quantize_tokens
from qserve.kernels.gpu_target import TARGETS, GpuTarget, Vendor
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul import kernel
from qserve.kernels.int4_matmul.launch import Int4ByteFormat, Int4Format
from qserve.kernels.int4_matmul.planar4 import is_progressive, pack_planar4
from qserve.kernels.tiled_matmul.kernel import TiledProduct, TiledWeight, run
from qserve.kernels.tiled_matmul.launch import MatmulLaunch, MatmulProblem, Tile, plan_launch

ONE_CORE = GpuTarget("sm_80", Vendor.NVIDIA, 1, 163 * 1024)
CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16)
NUM_OUTPUTS = 40  # a tile of 32 and a part of one


def make_weight(
    num_inputs: int, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> GroupedWeight:
    """A random weight ``[NUM_OUTPUTS, num_inputs]`` whose codes and zero points use all values."""
    generator = torch.Generator().manual_seed(num_inputs + group_size)
    groups = (NUM_OUTPUTS, num_inputs // group_size)
    return GroupedWeight(
        codes=torch.randint(0, 16, (NUM_OUTPUTS, num_inputs), generator=generator).byte(),
        scales=(0.01 + 0.02 * torch.rand(groups, generator=generator)).to(scale_dtype),
        zero_points=torch.randint(0, 16, groups, generator=generator).byte(),
        bits=4,
        group_size=group_size,
    )


def make_rows(num_rows: int, num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, num_inputs, generator=generator).to(dtype)


def make_launch(
    hoist: bool, assembly: bool, x: torch.Tensor, weight: GroupedWeight
) -> MatmulLaunch:
    """A launch in one segment, with a tile as small as the tensor cores take."""
    group_size = gcd(weight.group_size, 128)
    wide = weight.scales.dtype is torch.bfloat16
    problem = MatmulProblem(
        x.shape[0], weight.out_features, weight.in_features, group_size, x.dtype
    )
    format = Int4Format(group_size, problem.in_features % 128 == 0, hoist, assembly, wide)
    return plan_launch(problem, format, Tile(16, 32, 4, 2), ONE_CORE)


def in_segments(launch: MatmulLaunch, parallel: bool) -> MatmulLaunch:
    """``launch`` with one segment for each block of inputs."""
    num_segments = launch.blocks_per_segment
    return replace(
        launch,
        num_segments=num_segments,
        blocks_per_segment=1,
        parallel=parallel,
        grid=(*launch.grid[:2], num_segments if parallel else 1),
    )


def multiply(
    x: torch.Tensor,
    weight: GroupedWeight,
    launch: MatmulLaunch,
    bias: torch.Tensor | None = None,
    row_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel's product in a matrix full of NaN: what it does not write cannot pass."""
    out = torch.full((x.shape[0], weight.out_features), float("nan"), dtype=x.dtype)
    packed = pack_planar4(weight)
    tiled = TiledWeight(packed.words, packed.parameters, weight.channel_scales, bias)
    run(TiledProduct(x, tiled, launch, kernel.sum_blocks, row_scales), out)
    return out


def is_close(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: GroupedWeight,
    hoist: bool,
    bias: torch.Tensor | float = 0.0,
) -> bool:
    """Whether ``out`` is the product up to the roundings that the launch makes.

    Products and sums are exact to 2^-20 or better. The result is rounded once to its dtype, and
    without hoisting every weight is rounded to float16 before: by 2^-11 of itself at most.
    """
    dense = weight.dequantize()
    expected = x.double() @ dense.double().T + bias
    magnitude = x.double().abs() @ dense.double().abs().T
    result_step = torch.finfo(out.dtype).eps / 2
    weight_step = 2**-20 if hoist else 2**-11
    allowed = result_step * expected.abs() + weight_step * magnitude
    return bool(((out.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("dtype", "group_size", "hoist", "assembly"),
    [
        case
        for case in product(DTYPES, (32, 64, 128), (True, False), (True, False))
        if case[0] is torch.float16 or case[2]  # the scale is never in the loop for bfloat16
    ],
)
def test_the_kernel_computes_what_the_weight_stands_for(
    dtype: torch.dtype, group_size: int, hoist: bool, assembly: bool
) -> None:
    weight = make_weight(256, group_size)
    x = make_rows(5, 256, dtype)
    launch = make_launch(hoist, assembly, x, weight)
    assert is_close(multiply(x, weight, launch), x, weight, launch.format.hoist)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_inputs", "group_size"), [(320, 64), (160, 32), (288, 96), (64, 64)])
def test_inputs_need_not_fill_a_block_nor_rows_a_tile(
    dtype: torch.dtype, num_inputs: int, group_size: int
) -> None:
    weight = make_weight(num_inputs, group_size)
    x = make_rows(17, num_inputs, dtype)
    launch = make_launch(True, True, x, weight)
    assert is_close(multiply(x, weight, launch), x, weight, launch.format.hoist)


@pytest.mark.parametrize("hoist", [True, False])
def test_rows_may_lie_apart(hoist: bool) -> None:
    weight = make_weight(128, 64)
    x = make_rows(3, 256, torch.float16)[:, 64:192]
    launch = make_launch(hoist, True, x, weight)
    assert is_close(multiply(x, weight, launch), x, weight, launch.format.hoist)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_may_be_bfloat16(dtype: torch.dtype) -> None:
    weight = make_weight(128, 32, torch.bfloat16)
    x = make_rows(2, 128, dtype)
    launch = make_launch(True, True, x, weight)
    assert is_close(multiply(x, weight, launch), x, weight, launch.format.hoist)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_summed_in_parallel_and_in_turn_agree_to_the_bit(dtype: torch.dtype) -> None:
    weight = make_weight(384, 128)
    x = make_rows(18, 384, dtype)
    launch = make_launch(True, True, x, weight)
    apart = multiply(x, weight, in_segments(launch, parallel=True))
    assert is_close(apart, x, weight, True)
    assert torch.equal(apart, multiply(x, weight, in_segments(launch, parallel=False)))


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    weight = make_weight(256, 64)
    x = make_rows(20, 256, torch.float16)
    batch = make_launch(True, True, x, weight)
    wide = replace(batch, tile=Tile(32, 32, 4, 2), grid=(2, 1, 1))
    alone = make_launch(True, True, x[19:], weight)
    row = multiply(x[19:], weight, in_segments(alone, parallel=True))
    assert torch.equal(multiply(x, weight, in_segments(batch, parallel=True))[19:], row)
    assert torch.equal(multiply(x, weight, in_segments(wide, parallel=False))[19:], row)


@pytest.mark.parametrize("hoist", [True, False])
@pytest.mark.parametrize("position", [0, 33, 70, 127, 128, 255])
def test_a_code_off_by_one_step_is_noticed(hoist: bool, position: int) -> None:
    weight = make_weight(256, 64)
    x = make_rows(5, 256, torch.float16)
    launch = make_launch(hoist, False, x, weight)
    codes = weight.codes.clone()
    codes[7, position] ^= 1
    out = multiply(x, replace(weight, codes=codes), launch)
    assert not is_close(out, x, weight, hoist)


def test_a_zero_point_off_by_one_step_is_noticed() -> None:
    weight = make_weight(256, 128)
    x = make_rows(5, 256, torch.bfloat16)
    launch = make_launch(True, True, x, weight)
    zero_points = weight.zero_points.clone()
    zero_points[39, 1] ^= 1
    assert not is_close(
        multiply(x, replace(weight, zero_points=zero_points), launch), x, weight, True
    )


def make_progressive(num_inputs: int) -> GroupedWeight:
    """A weight of integer scales whose products with codes use all of int8, and outer scales."""
    weight = make_weight(num_inputs, 128)
    generator = torch.Generator().manual_seed(1)
    factors = torch.randint(1, 9, weight.scales.shape, generator=generator)
    return replace(
        weight,
        scales=factors.half(),
        channel_scales=0.01 + 0.02 * torch.rand(NUM_OUTPUTS, generator=generator),
    )


def make_order(weight: GroupedWeight) -> GroupedWeight:
    generator = torch.Generator().manual_seed(2)
    return replace(weight, input_order=torch.randperm(weight.in_features, generator=generator))


def run_product(
    x: torch.Tensor,
    weight: GroupedWeight,
    bias: torch.Tensor | None = None,
    activations: Activations = Activations.FLOAT32,
) -> torch.Tensor:
    """The product as the op takes it, on an A100 as far as the launch rules can tell."""
    out = torch.full((x.shape[0], weight.out_features), float("nan"), dtype=x.dtype)
    kernel.prepare(weight, CPU, bias).run(x, out, activations)
    return out


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "gpu_target", lambda _: TARGETS["sm_80"])


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_out_of_order_outer_scales_and_a_bias_are_followed(dtype: torch.dtype) -> None:
    weight = make_order(make_progressive(256))
    x = make_rows(3, 256, dtype)
    bias = torch.linspace(-9, 9, NUM_OUTPUTS)
    assert is_close(run_product(x, weight, bias), x, weight, True, bias)
    assert not is_close(run_product(x, weight, bias.roll(1)), x, weight, True, bias)


@pytest.mark.parametrize("parallel", [True, False])
def test_scales_and_bias_are_applied_once_however_segments_are_added(parallel: bool) -> None:
    weight = replace(make_weight(256, 128), channel_scales=torch.rand(NUM_OUTPUTS) + 0.5)
    x = make_rows(3, 256, torch.float16)
    bias, row_scales = torch.linspace(-3, 3, NUM_OUTPUTS), torch.tensor([0.5, 3.0, 1.0])
    launch = in_segments(make_launch(True, True, x, weight), parallel)
    out = multiply(x, weight, launch, bias, row_scales)
    assert is_close(out, x.double() * row_scales[:, None], weight, True, bias)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 128])
def test_rows_rounded_to_int8_are_multiplied_as_integers(
    group_size: int, dtype: torch.dtype
) -> None:
    weight = make_order(make_weight(256, group_size))
    x = make_rows(5, 256, dtype)
    codes, scales = quantize_tokens(x[:, weight.input_order])
    rounded = torch.empty(x.shape, dtype=torch.float64)
    rounded[:, weight.input_order] = codes.double() * scales.double()[:, None]
    exact = group_size == 128 or dtype is torch.bfloat16
    out = run_product(x, weight, activations=Activations.INT8_TOKEN)
    assert is_close(out, rounded, weight, exact)
    assert not is_close(out, x, weight, exact)


@pytest.mark.parametrize("assembly", [True, False])
@pytest.mark.parametrize("progressive", [True, False])
def test_both_ways_to_scale_int8_products_agree_with_the_definition(
    progressive: bool, assembly: bool
) -> None:
    weight = make_progressive(256) if progressive else make_weight(256, 128)
    assert is_progressive(weight) == progressive
    x = make_rows(5, 256, torch.float16)
    codes, scales = quantize_tokens(x)
    problem = MatmulProblem(5, NUM_OUTPUTS, 256, 128, torch.int8)
    format = Int4ByteFormat(128, progressive, assembly, False)
    launch = plan_launch(problem, format, Tile(16, 32, 4, 2), ONE_CORE)
    packed = pack_planar4(weight)
    tiled = TiledWeight(packed.words.view(torch.int8), packed.parameters, weight.channel_scales)
    out = torch.full((5, NUM_OUTPUTS), float("nan"))
    order = planar_order(256)
    run(TiledProduct(codes[:, order], tiled, launch, kernel.sum_byte_blocks, scales), out)
    rounded = codes.double() * scales.double()[:, None]
    assert is_close(out, rounded, weight, True)
    off = replace(weight, codes=weight.codes ^ (torch.arange(256) == 77))
    assert not is_close(out, rounded, off, True)


def planar_order(num_inputs: int) -> torch.Tensor:
    """The input at each place of a row for planar4 as bytes, read off the layout itself."""
    codes = torch.arange(num_inputs)
    blocks = codes.unflatten(0, (-1, 4, 32))  # by plane and container
    lower, upper = blocks[:, 0::2], blocks[:, 1::2]
    return torch.cat([lower.transpose(1, 2), upper.transpose(1, 2)], 1).flatten()
