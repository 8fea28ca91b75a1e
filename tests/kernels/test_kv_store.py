"""Rotation and store: native kernels of every instruction set against the reference."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.kv_codes import KvCodes, decode, encode
from qserve.kernels.kv_store import reference, rope_and_store, rope_table

FLOATS = (KvFormat.FLOAT16, KvFormat.BFLOAT16, KvFormat.FLOAT32)


def empty_cache(
    format: KvFormat = KvFormat.FLOAT16, head_dim: int = 64, num_kv_heads: int = 3
) -> LayerCache:
    return LayerCache.allocate(format, 6, num_kv_heads, 8, head_dim)


def stored_keys(cache: LayerCache) -> torch.Tensor:
    return decode(KvCodes(cache.k, cache.k_scales, cache.k_offsets), cache.format)


@pytest.mark.parametrize("format", KvFormat)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "interleaved"),
    [(16, 16, False), (20, 20, True), (64, 64, False), (64, 16, False), (64, 64, True)]
    + [(72, 72, False), (80, 20, True), (96, 96, False), (128, 34, False), (256, 256, True)],
)  # fmt: skip
@pytest.mark.usefixtures("isa")
def test_the_native_result_is_that_of_the_reference(
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    format: KvFormat,
    generator: torch.Generator,
) -> None:
    native_cache, expected_cache = empty_cache(format, head_dim), empty_cache(format, head_dim)
    wide = torch.randn(11, (9 + 6) * head_dim + 5, generator=generator)
    qkv, expected = wide[:, :-5], wide[:, :-5].clone()
    positions = torch.randint(0, 100, (11,), generator=generator, dtype=torch.int32)
    slots = torch.randperm(48, generator=generator)[:11].int()
    table = rope_table(rotary_dim, 100, 10000.0)
    rope_and_store(qkv, positions, table, native_cache, slots, interleaved=interleaved)
    reference.rope_and_store(expected, positions, table, expected_cache, slots, interleaved)
    # Two products and a sum: an ulp or two of the operands, and half an ulp of the cache's dtype,
    # or a whole one where the two float32 results lie on different sides of a tie.
    assert torch.allclose(qkv, expected, rtol=0, atol=2e-6)
    keys, expected_keys = stored_keys(native_cache), stored_keys(expected_cache)
    if format.has_scales:
        differing = (keys - expected_keys).abs() > 1e-5  # on different sides of a tie
        assert differing.float().mean() < 2e-3
        assert torch.allclose(keys, expected_keys, rtol=0.15, atol=0.5)
    else:
        unit = torch.finfo(format.dtype).eps
        assert torch.allclose(keys, expected_keys, rtol=unit, atol=2e-6)
    # Values are not rotated: the same floats must give the same bits.
    assert torch.equal(native_cache.v.view(torch.uint8), expected_cache.v.view(torch.uint8))
    for name in ("v_scales", "v_offsets"):
        found, wanted = getattr(native_cache, name), getattr(expected_cache, name)
        assert (found is None and wanted is None) or torch.equal(found, wanted)


@pytest.mark.parametrize("format", FLOATS)
@pytest.mark.usefixtures("isa")
def test_values_are_stored_with_the_rounding_of_torch(format: KvFormat) -> None:
    cache = empty_cache(format, 64, 1)
    # Magnitudes from below the smallest subnormal of float16 to above its largest number.
    values = (2.0 ** torch.arange(-32, 32)) * 1.000488281251
    values = torch.stack([values, -values, values * 1.0004882, values * 0.99951172])
    values[0, 0], values[1, 0], values[2, 0] = torch.inf, -torch.inf, torch.nan
    store_values(cache, values)
    expected = values.to(format.dtype).nan_to_num(7.0)
    assert torch.equal(cache.v[0, 0, :4].nan_to_num(7.0), expected)


def store_values(cache: LayerCache, values: torch.Tensor) -> None:
    """Stores ``values [T, D]`` in the first slots of a cache of one head."""
    num_tokens, head_dim = values.shape
    qkv = torch.cat([torch.zeros(num_tokens, 2 * head_dim), values], dim=1)
    positions = torch.zeros(num_tokens, dtype=torch.int32)
    slots = torch.arange(num_tokens, dtype=torch.int32)
    rope_and_store(qkv, positions, rope_table(head_dim, 1, 10000.0), cache, slots)


@pytest.mark.parametrize("format", [KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4])
@pytest.mark.usefixtures("isa")
def test_heads_of_every_size_have_the_codes_of_the_definition(
    format: KvFormat, generator: torch.Generator
) -> None:
    cache = empty_cache(format, 64, 1)
    values = torch.randn(8, 64, generator=generator)
    values *= torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 1.0, 300.0, 4e4, 1e6])[:, None]
    values[4, 3] = 1000.0  # the others are rounded to few codes, or to subnormal ones
    store_values(cache, values)
    expected = encode(values, format)
    assert torch.equal(cache.v[0, 0].view(torch.uint8), expected.codes.view(torch.uint8))
    assert cache.v_scales is not None and expected.scales is not None
    assert torch.equal(cache.v_scales[0, 0], expected.scales)


@pytest.mark.parametrize("format", [KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("isa")
def test_a_number_that_is_none_or_infinite_is_not_lost(format: KvFormat, value: float) -> None:
    cache = empty_cache(format, 64, 1)
    values = torch.ones(1, 64)
    values[0, 40] = value
    store_values(cache, values)
    assert cache.v_scales is not None and not cache.v_scales[0, 0, 0].isfinite()


@pytest.mark.usefixtures("isa")
def test_a_negative_slot_is_rotated_and_not_stored(generator: torch.Generator) -> None:
    cache = empty_cache()
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
    rope_and_store(qkv, zero, rope_table(64, 1, 10000.0), empty_cache(), zero)
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
    cache, table = empty_cache(), rope_table(64, 10, 10000.0)
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
        rope_and_store(torch.zeros(1, width), zero, rope_table(64, 9, 1e4), empty_cache(), zero)


@pytest.mark.parametrize("columns", [63, 66])
def test_a_table_that_does_not_fit_the_heads_is_refused(columns: int) -> None:
    zero = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="cos_sin"):
        rope_and_store(torch.zeros(1, 7 * 64), zero, torch.zeros(9, columns), empty_cache(), zero)
