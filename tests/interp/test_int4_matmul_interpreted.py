"""The Triton int4 matmul agrees with its definition, in every variant a launch can ask for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import gcd

import pytest
import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul import kernel
from qserve.kernels.int4_matmul.launch import Int4Launch, Int4Problem, Unpack
from qserve.kernels.int4_matmul.planar4 import pack_planar4

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


def make_launch(hoist: bool, unpack: Unpack, x: torch.Tensor, weight: GroupedWeight) -> Int4Launch:
    """A launch in one segment, with a tile as small as the tensor cores take."""
    group_size = gcd(weight.group_size, 128)
    num_rows, num_inputs = x.shape
    return Int4Launch(
        problem=Int4Problem(num_rows, NUM_OUTPUTS, num_inputs, group_size, x.dtype),
        block_m=16,
        block_n=32,
        num_warps=4,
        num_stages=2,
        num_segments=1,
        blocks_per_segment=-(-num_inputs // 128),
        parallel=False,
        hoist=hoist,
        unpack=unpack,
        grid=(-(-NUM_OUTPUTS // 32), -(-num_rows // 16), 1),
    )


def in_segments(launch: Int4Launch, parallel: bool) -> Int4Launch:
    """``launch`` with one segment for each block of inputs."""
    num_segments = launch.blocks_per_segment
    return replace(
        launch,
        num_segments=num_segments,
        blocks_per_segment=1,
        parallel=parallel,
        grid=(*launch.grid[:2], num_segments if parallel else 1),
    )


def multiply(x: torch.Tensor, weight: GroupedWeight, launch: Int4Launch) -> torch.Tensor:
    """The kernel's product in a matrix full of NaN: what it does not write cannot pass."""
    out = torch.full((x.shape[0], weight.out_features), float("nan"), dtype=x.dtype)
    kernel.run(x, pack_planar4(weight), out, launch)
    return out


def is_close(out: torch.Tensor, x: torch.Tensor, weight: GroupedWeight, launch: Int4Launch) -> bool:
    """Whether ``out`` is the product up to the roundings that ``launch`` makes.

    Products and sums are exact to 2^-20 or better. The result is rounded once to its dtype, and
    without hoisting every weight is rounded to float16 before: by 2^-11 of itself at most.
    """
    dense = weight.dequantize()
    expected = x.double() @ dense.double().T
    magnitude = x.double().abs() @ dense.double().abs().T
    result_step = torch.finfo(x.dtype).eps / 2
    weight_step = 2**-20 if launch.hoist else 2**-11
    allowed = result_step * expected.abs() + weight_step * magnitude
    return bool(((out.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("dtype", "group_size", "hoist", "unpack"),
    [
        case
        for case in product(DTYPES, (32, 64, 128), (True, False), Unpack)
        if case[0] is torch.float16 or case[2]  # the scale is never in the loop for bfloat16
    ],
)
def test_the_kernel_computes_what_the_weight_stands_for(
    dtype: torch.dtype, group_size: int, hoist: bool, unpack: Unpack
) -> None:
    weight = make_weight(256, group_size)
    x = make_rows(5, 256, dtype)
    launch = make_launch(hoist, unpack, x, weight)
    assert is_close(multiply(x, weight, launch), x, weight, launch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_inputs", "group_size"), [(320, 64), (160, 32), (288, 96), (64, 64)])
def test_inputs_need_not_fill_a_block_nor_rows_a_tile(
    dtype: torch.dtype, num_inputs: int, group_size: int
) -> None:
    weight = make_weight(num_inputs, group_size)
    x = make_rows(17, num_inputs, dtype)
    launch = make_launch(True, Unpack.LOP3, x, weight)
    assert is_close(multiply(x, weight, launch), x, weight, launch)


@pytest.mark.parametrize("hoist", [True, False])
def test_rows_may_lie_apart(hoist: bool) -> None:
    weight = make_weight(128, 64)
    x = make_rows(3, 256, torch.float16)[:, 64:192]
    launch = make_launch(hoist, Unpack.LOP3, x, weight)
    assert is_close(multiply(x, weight, launch), x, weight, launch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_may_be_bfloat16(dtype: torch.dtype) -> None:
    weight = make_weight(128, 32, torch.bfloat16)
    x = make_rows(2, 128, dtype)
    launch = make_launch(True, Unpack.LOP3, x, weight)
    assert is_close(multiply(x, weight, launch), x, weight, launch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_summed_in_parallel_and_in_turn_agree_to_the_bit(dtype: torch.dtype) -> None:
    weight = make_weight(384, 128)
    x = make_rows(18, 384, dtype)
    launch = make_launch(True, Unpack.LOP3, x, weight)
    apart = multiply(x, weight, in_segments(launch, parallel=True))
    assert is_close(apart, x, weight, launch)
    assert torch.equal(apart, multiply(x, weight, in_segments(launch, parallel=False)))


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    weight = make_weight(256, 64)
    x = make_rows(20, 256, torch.float16)
    batch = make_launch(True, Unpack.LOP3, x, weight)
    wide = replace(batch, block_m=32, grid=(2, 1, 1))
    alone = make_launch(True, Unpack.LOP3, x[19:], weight)
    row = multiply(x[19:], weight, in_segments(alone, parallel=True))
    assert torch.equal(multiply(x, weight, in_segments(batch, parallel=True))[19:], row)
    assert torch.equal(multiply(x, weight, in_segments(wide, parallel=False))[19:], row)


@pytest.mark.parametrize("hoist", [True, False])
@pytest.mark.parametrize("position", [0, 33, 70, 127, 128, 255])
def test_a_code_off_by_one_step_is_noticed(hoist: bool, position: int) -> None:
    weight = make_weight(256, 64)
    x = make_rows(5, 256, torch.float16)
    launch = make_launch(hoist, Unpack.PLAIN, x, weight)
    codes = weight.codes.clone()
    codes[7, position] ^= 1
    out = multiply(x, replace(weight, codes=codes), launch)
    assert not is_close(out, x, weight, launch)


def test_a_zero_point_off_by_one_step_is_noticed() -> None:
    weight = make_weight(256, 128)
    x = make_rows(5, 256, torch.bfloat16)
    launch = make_launch(True, Unpack.LOP3, x, weight)
    zero_points = weight.zero_points.clone()
    zero_points[39, 1] ^= 1
    assert not is_close(
        multiply(x, replace(weight, zero_points=zero_points), launch), x, weight, launch
    )
