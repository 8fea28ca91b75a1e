"""Planar4 holds what it was given, in the bit positions that the kernel reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul.planar4 import pack_planar4, unpack_planar4


def make_weight(
    num_inputs: int, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> GroupedWeight:
    generator = torch.Generator().manual_seed(num_inputs)
    groups = (6, num_inputs // group_size)
    return GroupedWeight(
        codes=torch.randint(0, 16, (6, num_inputs), generator=generator).byte(),
        scales=(torch.randn(groups, generator=generator) / 100).to(scale_dtype),
        zero_points=torch.randint(0, 16, groups, generator=generator).byte(),
        bits=4,
        group_size=group_size,
    )


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_inputs", "group_size"), [(256, 128), (576, 64), (160, 32), (384, 384), (1024, 256)]
)
def test_what_is_packed_comes_back(
    num_inputs: int, group_size: int, scale_dtype: torch.dtype
) -> None:
    weight = make_weight(num_inputs, group_size, scale_dtype)
    back = unpack_planar4(pack_planar4(weight))
    assert back.group_size == group_size
    assert back.scales.dtype is scale_dtype
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(back.zero_points, weight.zero_points)


@pytest.mark.parametrize(("num_inputs", "group_size", "smaller"), [(576, 576, 64), (96, 96, 32)])
def test_groups_of_other_sizes_become_several_with_one_scale(
    num_inputs: int, group_size: int, smaller: int
) -> None:
    weight = make_weight(num_inputs, group_size)
    packed = pack_planar4(weight)
    assert packed.group_size == smaller
    assert torch.equal(unpack_planar4(packed).dequantize(), weight.dequantize())


def test_codes_lie_in_four_planes_of_32_neighbours() -> None:
    weight = make_weight(128, 128)
    codes = torch.zeros_like(weight.codes)
    codes[2, 5], codes[2, 32 + 5], codes[2, 64 + 5], codes[2, 96 + 5] = 1, 2, 3, 4
    words = pack_planar4(replace(weight, codes=codes)).words
    assert words.shape == (6, 32)
    assert int(words[2, 5]) == 0x4321
    assert int(words.count_nonzero()) == 1


def test_parameters_are_a_scale_and_a_zero_point_in_one_word() -> None:
    weight = make_weight(128, 64)
    weight.scales[3, 1], weight.zero_points[3, 1] = -1.0, 11
    parameters = pack_planar4(weight).parameters
    assert parameters.shape == (2, 6)
    assert int(parameters[1, 3]) == 0xBBC00  # 0xbc00 is -1 in float16


def test_inputs_that_are_padded_weigh_nothing() -> None:
    packed = pack_planar4(make_weight(160, 32))
    assert packed.words.shape == (6, 64)
    assert int(packed.words[:, 32 + 1 :].bitwise_and(-16).count_nonzero()) == 0
    assert int(packed.parameters[5:].count_nonzero()) == 0


def test_nbytes_counts_words_and_parameters() -> None:
    packed = pack_planar4(make_weight(256, 128))
    assert packed.nbytes == 6 * 256 // 2 + 6 * 2 * 4


def test_a_group_smaller_than_a_plane_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_planar4(make_weight(128, 16))


def test_wider_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="8 bits"):
        pack_planar4(replace(make_weight(128, 64), bits=8))


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_a_scale_outside_float16_is_refused(scale: float) -> None:
    weight = make_weight(128, 64, torch.float32)
    weight.scales[0, 0] = scale
    with pytest.raises(ValueError, match="float16"):
        pack_planar4(weight)
