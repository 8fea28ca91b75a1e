"""Rotation and store: native kernels of every instruction set against the reference."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.kv_store import reference, rope_and_store, rope_table

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def empty_cache(dtype: torch.dtype, head_dim: int = 64, num_kv_heads: int = 3) -> LayerCache:
    shape = (6, num_kv_heads, 8, head_dim)
    return LayerCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 128])
@pytest.mark.usefixtures("isa")
def test_the_native_result_is_that_of_the_reference(
    head_dim: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    native_cache, expected_cache = empty_cache(dtype, head_dim), empty_cache(dtype, head_dim)
    wide = torch.randn(11, (9 + 6) * head_dim + 5, generator=generator)
    qkv, expected = wide[:, :-5], wide[:, :-5].clone()
    positions = torch.randint(0, 100, (11,), generator=generator, dtype=torch.int32)
    slots = torch.randperm(48, generator=generator)[:11].int()
    table = rope_table(head_dim, 100, 10000.0)
    rope_and_store(qkv, positions, table, native_cache, slots)
    reference.rope_and_store(expected, positions, table, expected_cache, slots, False)
    # Two products and a sum: an ulp or two of the operands, and half an ulp of the cache's dtype,
    # or a whole one where the two float32 results lie on different sides of a tie.
    assert torch.allclose(qkv, expected, rtol=0, atol=2e-6)
    unit = torch.finfo(dtype).eps
    assert torch.allclose(native_cache.k, expected_cache.k, rtol=unit, atol=2e-6)
    assert torch.equal(native_cache.v, expected_cache.v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_values_are_stored_with_the_rounding_of_torch(dtype: torch.dtype) -> None:
    cache = empty_cache(dtype, 64, 1)
    # Magnitudes from below the smallest subnormal of float16 to above its largest number.
    values = (2.0 ** torch.arange(-32, 32)) * 1.000488281251
    values = torch.stack([values, -values, values * 1.0004882, values * 0.99951172])
    values[0, 0], values[1, 0], values[2, 0] = torch.inf, -torch.inf, torch.nan
    qkv = torch.cat([torch.zeros(4, 2 * 64), values], dim=1)
    positions = torch.zeros(4, dtype=torch.int32)
    slots = torch.arange(4, dtype=torch.int32)
    rope_and_store(qkv, positions, rope_table(64, 1, 10000.0), cache, slots)
    assert torch.equal(cache.v[0, 0, :4].nan_to_num(7.0), values.to(dtype).nan_to_num(7.0))


@pytest.mark.usefixtures("isa")
def test_a_negative_slot_is_rotated_and_not_stored(generator: torch.Generator) -> None:
    cache = empty_cache(torch.float16)
    qkv = torch.randn(2, 7 * 64, generator=generator)
    before = qkv.clone()
    positions, slots = torch.full((2,), 3).int(), torch.tensor([-1, 9], dtype=torch.int32)
    rope_and_store(qkv, positions, rope_table(64, 10, 10000.0), cache, slots)
    assert not torch.equal(qkv[0, : 4 * 64], before[0, : 4 * 64])
    assert torch.equal(qkv[:, 4 * 64 :], before[:, 4 * 64 :])
    assert cache.v.count_nonzero() == 3 * 64
    assert torch.equal(cache.v[1, :, 1].float(), qkv[1, 4 * 64 :].view(3, 64).half().float())


def test_position_zero_is_not_rotated(generator: torch.Generator) -> None:
    qkv = torch.randn(1, 7 * 64, generator=generator)
    before, zero = qkv.clone(), torch.zeros(1, dtype=torch.int32)
    rope_and_store(qkv, zero, rope_table(64, 1, 10000.0), empty_cache(torch.float16), zero)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize(
    ("positions", "slots", "error"),
    [
        ([0, 10], [0, 1], ValueError),
        ([0, -1], [0, 1], ValueError),
        ([0, 1], [0, 48], ValueError),
        ([0, 1, 2], [0, 1], ValueError),
        ([0.0, 1.0], [0, 1], TypeError),
    ],
)
def test_positions_and_slots_outside_are_refused(
    positions: list[int], slots: list[int], error: type[Exception]
) -> None:
    cache, table = empty_cache(torch.float16), rope_table(64, 10, 10000.0)
    indices = torch.tensor(positions)
    indices = indices if indices.is_floating_point() else indices.int()
    with pytest.raises(error):
        rope_and_store(
            torch.zeros(2, 7 * 64), indices, table, cache, torch.tensor(slots, dtype=torch.int32)
        )


@pytest.mark.parametrize("width", [6 * 64, 7 * 64 + 1])
def test_a_width_that_is_no_number_of_heads_is_refused(width: int) -> None:
    zero = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="columns"):
        rope_and_store(
            torch.zeros(1, width), zero, rope_table(64, 9, 1e4), empty_cache(torch.float16), zero
        )


@pytest.mark.parametrize("columns", [63, 66])
def test_a_table_that_does_not_fit_the_heads_is_refused(columns: int) -> None:
    zero = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="cos_sin"):
        rope_and_store(
            torch.zeros(1, 7 * 64), zero, torch.zeros(9, columns), empty_cache(torch.float16), zero
        )
