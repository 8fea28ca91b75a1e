"""The layouts of the Triton matmuls hold what they were given, and rows meet their experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qserve.kernels.codebook_matmul import layout as codebook_layout
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.expert_matmul.launch import suits_tiles
from qserve.kernels.float8_matmul import layout as float8_layout
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul.planar4 import is_progressive
from qserve.kernels.int8_matmul import layout as int8_layout
from qserve.kernels.tiled_matmul.launch import count_tiles
from qserve.kernels.tiled_matmul.parameters import pack_parameters, to_half
from qserve.kernels.tiled_matmul.routing import share_rows


def make_int8(num_inputs: int, group_size: int, zero_point: int = 128) -> GroupedWeight:
    generator = torch.Generator().manual_seed(num_inputs)
    groups = (3, num_inputs // group_size)
    return GroupedWeight(
        codes=torch.randint(0, 256, (3, num_inputs), generator=generator).byte(),
        scales=0.5 + torch.rand(groups, generator=generator),
        zero_points=torch.full(groups, zero_point).byte(),
        bits=8,
        group_size=group_size,
    )


def test_one_scale_an_output_leaves_the_loop() -> None:
    weight = replace(make_int8(160, 160), channel_scales=torch.tensor([1.0, 2.0, 3.0]))
    packed = int8_layout.pack_int8(weight)
    assert packed.parameters is None and packed.channel_scales is not None
    assert packed.codes.shape == (3, 256) and not packed.codes[:, 160:].any()
    dense = packed.codes[:, :160].float() * packed.channel_scales[:, None]
    assert torch.allclose(dense, weight.dequantize())


@pytest.mark.parametrize(("group_size", "expected"), [(96, 32), (32, 32), (192, 64), (384, 384)])
def test_groups_are_split_until_a_block_holds_whole_ones(group_size: int, expected: int) -> None:
    packed = int8_layout.pack_int8(make_int8(384, group_size, zero_point=3))
    assert packed.group_size == expected and packed.asymmetric
    assert packed.parameters is not None and packed.parameters.shape == (384 // expected, 3)
    zeros = (packed.parameters >> 16).to(torch.int16).view(torch.bfloat16)
    assert bool((zeros == 3 - 128).all())


def test_groups_of_no_whole_product_are_refused() -> None:
    weight = make_int8(160, 20)
    assert not int8_layout.suits_tiles(weight)
    with pytest.raises(ValueError, match="multiple of 32"):
        int8_layout.pack_int8(weight)
    with pytest.raises(ValueError, match="expected 8"):
        int8_layout.pack_int8(replace(weight, bits=4))


def test_parameters_hold_a_scale_and_a_zero_point() -> None:
    scales, zeros = torch.tensor([[0.5, -2.0]]).half(), torch.tensor([[3, 15]]).byte()
    packed = pack_parameters(scales, zeros)
    assert packed.shape == (2, 1)
    assert torch.equal(packed.to(torch.int16).view(torch.float16).T, scales)
    assert torch.equal(packed.T >> 16, zeros.int())


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="store them as bfloat16"):
        to_half(torch.tensor([1e-9]))
    assert to_half(torch.tensor([1e-9]).bfloat16()).dtype is torch.bfloat16


def make_float8(block: tuple[int, int]) -> Float8Weight:
    values = torch.tensor([[1.0, -0.0, 448.0] * 64] * 4).to(torch.float8_e4m3fn)
    shape = (-(-4 // block[0]), -(-192 // block[1]))
    return Float8Weight(values, torch.rand(shape) + 0.5, block)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("block", [(4, 192), (1, 192), (2, 64), (128, 96)])
def test_float8_values_keep_their_meaning(block: tuple[int, int], dtype: torch.dtype) -> None:
    weight = make_float8(block)
    packed = float8_layout.pack_float8(weight, dtype)
    assert packed.values.shape == (4, 256)
    values = packed.values[:, :192].float()
    if packed.parameters is None:
        assert packed.channel_scales is not None
        scales = packed.channel_scales[:, None]
    else:
        assert packed.parameters.shape[0] == 256 // packed.group_size
        scales = packed.parameters.T.repeat_interleave(packed.group_size, 1)[:, :192]
    assert torch.equal(values * scales, weight.dequantize())


def test_float8_blocks_of_no_whole_product_are_refused() -> None:
    weight = make_float8((4, 16))
    assert not float8_layout.suits_tiles(weight)
    with pytest.raises(ValueError, match="multiple of 32"):
        float8_layout.pack_float8(weight, torch.float8_e4m3fn)


def test_codebook_blocks_that_cross_rows_are_split() -> None:
    codes = torch.arange(3 * 160).reshape(3, 160).remainder(16).byte()
    weight = CodebookWeight(codes, torch.arange(16).float(), torch.rand(8), 64)
    packed = codebook_layout.pack_codebook(weight)
    assert packed.group_size == 32 and packed.parameters.shape == (5 + 1 + 2, 3)
    scales = packed.parameters[:5].T.repeat_interleave(32, 1)
    assert torch.equal(codes.float() * scales, weight.dequantize())


def make_int4(scales: torch.Tensor, channel_scales: torch.Tensor | None) -> GroupedWeight:
    codes = torch.tensor([[0, 15] * 64] * 2).byte()
    zeros = torch.full(scales.shape, 8).byte()
    return GroupedWeight(codes, scales, zeros, 4, 128, channel_scales=channel_scales)


def test_only_integer_scales_that_keep_products_in_a_byte_are_progressive() -> None:
    outer = torch.ones(2)
    assert is_progressive(make_int4(torch.tensor([[1.0], [15.0]]), outer))
    assert not is_progressive(make_int4(torch.tensor([[1.0], [15.0]]), None))
    for scale in (1.5, 0.0, -1.0, 17.0):  # 17 * (0 - 8) is -136
        assert not is_progressive(make_int4(torch.tensor([[1.0], [scale]]), outer))


@pytest.mark.parametrize("block_m", [2, 16])
def test_every_row_is_in_one_tile_of_its_expert(block_m: int) -> None:
    ids = torch.randint(0, 5, (9, 3), generator=torch.Generator().manual_seed(0)).int()
    ids[ids == 3] = 4  # an expert without rows
    routing = share_rows(ids, 5, block_m, 3)
    assert routing.slots.numel() == count_tiles(27, 5, block_m) * block_m
    rows = routing.slots[routing.slots < 27]
    assert rows.sort().values.tolist() == list(range(27))
    for tile, expert in enumerate(routing.tile_experts.tolist()):
        slots = routing.slots[tile * block_m : (tile + 1) * block_m]
        assert bool((ids.flatten()[slots[slots < 27].long()] == expert).all())
    assert torch.equal(routing.row_experts, ids.flatten())


def test_experts_share_a_launch_only_if_they_are_alike() -> None:
    first, second = make_int8(128, 64), make_int8(128, 64)
    assert suits_tiles([first, second])
    assert not suits_tiles([first, make_int8(128, 32)])
    assert not suits_tiles([first, torch.zeros(3, 128)])
    assert not suits_tiles([replace(w, input_order=torch.arange(128)) for w in (first, second)])
