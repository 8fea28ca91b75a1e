"""A packed weight lives on as the bytes of its layout."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from qserve.kernels import dense_matmul, int4_matmul, int8_matmul, native
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.native_weight import NativeWeight, checksum
from qserve.kernels.packed_weight import PackedWeight, from_native, multiply

OUTPUTS, INPUTS, GROUP_SIZE = 40, 96, 32

generator = torch.Generator().manual_seed(0)
X = torch.randn(3, INPUTS, generator=generator)
GROUPS = (OUTPUTS, INPUTS // GROUP_SIZE)


def pack_int4() -> PackedWeight:
    codes = torch.randint(0, 16, (OUTPUTS, INPUTS), generator=generator).byte()
    scales = torch.rand(GROUPS, generator=generator)
    zeros = torch.randint(0, 16, GROUPS, generator=generator).byte()
    return int4_matmul.prepare(GroupedWeight(codes, scales, zeros, 4, GROUP_SIZE))


def pack_int8() -> PackedWeight:
    return int8_matmul.quantize_int8(torch.randn(OUTPUTS, INPUTS, generator=generator))


def pack_dense() -> PackedWeight:
    return dense_matmul.prepare(torch.randn(OUTPUTS, INPUTS, generator=generator).bfloat16())


PACKS = [pack_int4, pack_int8, pack_dense]


def read_layout(native: NativeWeight) -> bytes:
    return ctypes.string_at(native.address, native.nbytes)


@pytest.mark.parametrize("pack", PACKS)
def test_the_bytes_of_a_layout_make_the_same_weight_again(pack: Callable[[], PackedWeight]) -> None:
    weight = pack()
    assert weight.native is not None
    expected, layout = multiply(X, weight), read_layout(weight.native)
    copy = NativeWeight(weight.native.kind, weight.native.sizes)
    assert copy.nbytes == len(layout)
    address = copy.allocate()
    ctypes.memmove(address, layout, len(layout))
    assert copy.address == address
    del weight
    again = from_native(copy)
    assert (again.in_features, again.out_features) == (INPUTS, OUTPUTS)
    assert torch.equal(multiply(X, again), expected)
    ctypes.memset(address, 0, len(layout))
    assert not torch.equal(multiply(X, again), expected), "it does not read the memory"


def test_one_changed_bit_changes_the_checksum() -> None:
    content = torch.randint(0, 256, (300_000,), generator=generator).byte()
    expected = checksum(content.data_ptr(), content.numel())
    assert expected == checksum(content.clone().data_ptr(), content.numel())
    for place in (0, 63, 262_143, 262_144, 299_999):
        content[place] ^= 1
        assert checksum(content.data_ptr(), content.numel()) != expected
        content[place] ^= 1
    assert checksum(content.data_ptr(), content.numel() - 1) != expected
    threads = native.num_threads()
    native.set_num_threads(1)
    assert checksum(content.data_ptr(), content.numel()) == expected
    native.set_num_threads(threads)
