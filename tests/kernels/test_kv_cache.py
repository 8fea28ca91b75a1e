"""The formats of the KV cache: what a cache holds, and what rounding does to a head."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.hadamard import rotate, run_length
from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.kv_codes import KvCodes, decode, encode

QUANTIZED = [KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4]


@pytest.mark.parametrize("format", KvFormat)
def test_an_allocated_cache_is_zero_and_writable(format: KvFormat) -> None:
    cache = LayerCache.allocate(format, 3, 2, 4, 16)
    assert (cache.num_blocks, cache.num_kv_heads, cache.block_size, cache.head_dim) == (3, 2, 4, 16)
    assert cache.format is format
    assert (cache.k_scales is not None) == format.has_scales
    assert (cache.v_offsets is not None) == format.has_offsets
    assert not cache.k.float().any()
    cache.k[1, 1, 2] = 2
    assert cache.k.float().count_nonzero() == format.row_size(16)
    assert not cache.v.float().any()


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (KvFormat.FLOAT32, 256), (KvFormat.FLOAT16, 128), (KvFormat.BFLOAT16, 128),
        (KvFormat.FLOAT8, 66), (KvFormat.INT8, 66), (KvFormat.INT4, 36),
    ],
)  # fmt: skip
def test_a_row_takes_its_codes_its_scale_and_its_offset(format: KvFormat, expected: int) -> None:
    assert format.row_bytes(64) == expected
    cache = LayerCache.allocate(format, 1, 1, 1, 64)
    tensors = (cache.k, cache.k_scales, cache.k_offsets)
    assert sum(tensor.nbytes for tensor in tensors if tensor is not None) == expected


@pytest.mark.parametrize("format", QUANTIZED)
def test_rounding_is_to_the_nearest_code(format: KvFormat, generator: torch.Generator) -> None:
    x = torch.randn(50, 3, 64, generator=generator) * torch.logspace(-2, 2, 50)[:, None, None]
    rows = encode(x, format)
    error = decode(rows, format) - x
    assert rows.scales is not None
    step = rows.scales.float()[..., None]
    if format is KvFormat.FLOAT8:  # half a unit in the last of 4 bits, below 2^-6 of the subnormals
        step = step * 2.0 ** ((x / step).abs().log2().floor().clamp(-6) - 3)
    elif format is KvFormat.INT4:
        error = rotate(error)
    # The largest element may lie beyond the last code by what float16 rounds off the scale.
    slack = 1e-3 * x.abs().amax(-1, keepdim=True)
    assert bool((error.abs() <= step / 2 + slack).all())
    assert bool((error.abs() > step / 4).any())  # a code off by one is half a step too far or more


@pytest.mark.parametrize("format", QUANTIZED)
def test_the_largest_and_the_smallest_element_have_the_outermost_codes(format: KvFormat) -> None:
    x = torch.linspace(-1.0, 1.0, 16)
    codes = encode(rotate(x) if format is KvFormat.INT4 else x, format).codes.view(torch.uint8)
    expected = {
        KvFormat.FLOAT8: (0xFE, 0x7E),  # -448, 448
        KvFormat.INT8: (0x81, 0x7F),  # -127, 127
        KvFormat.INT4: (
            0x80,
            0xF7,
        ),  # element 0 is the low half of the first, 15 the high of the last
    }[format]
    assert (int(codes[0]), int(codes[-1])) == expected


@pytest.mark.parametrize("format", QUANTIZED)
def test_zeros_and_tiny_numbers_have_a_scale(format: KvFormat) -> None:
    x = torch.zeros(3, 16)
    x[1], x[2, 3] = 1e-30, -1e-7
    codes, scales, offsets = encode(x, format)
    assert scales is not None and bool((scales >= 2.0**-14).all())
    assert float((decode(KvCodes(codes, scales, offsets), format) - x).abs().max()) < 2.0**-14


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_number_that_is_none_is_not_lost(format: KvFormat) -> None:
    x = torch.ones(2, 16)
    x[0, 7] = torch.nan
    decoded = decode(encode(x, format), format)
    assert decoded[0].isnan().all() and decoded[1].isfinite().all()


@pytest.mark.parametrize("width", [2, 16, 64, 72, 80, 96, 128, 256])
def test_rotation_is_orthogonal_and_its_own_inverse(width: int, generator: torch.Generator) -> None:
    x, y = torch.randn(2, 5, width, generator=generator)
    assert torch.allclose(rotate(rotate(x)), x, rtol=0, atol=1e-6 * width**0.5)
    assert torch.allclose((rotate(x) * rotate(y)).sum(-1), (x * y).sum(-1), rtol=0, atol=1e-4)
    run = torch.zeros(width)
    run[0] = 1.0  # the first column of the matrix is constant
    expected = torch.zeros(width)
    expected[: run_length(width)] = run_length(width) ** -0.5
    assert torch.allclose(rotate(run), expected)


def test_rotation_follows_sylvester() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    eight = torch.kron(two, torch.kron(two, two)) / 8**0.5
    assert torch.allclose(rotate(torch.eye(8)), eight)


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Zeros of the first two shapes in ``dtype``, of the others in float16."""
    return [torch.zeros(s, dtype=torch.float16 if i > 1 else dtype) for i, s in enumerate(shapes)]


CODES, SCALES = (2, 1, 8, 4), (2, 1, 8)


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        (tensors(torch.float32, (2, 1, 8), (2, 1, 8)), ValueError),
        (tensors(torch.float32, CODES, (2, 1, 8, 5)), ValueError),
        ([torch.zeros(CODES), torch.zeros(CODES).half()], TypeError),
        (tensors(torch.int32, CODES, CODES), TypeError),
        ([torch.zeros(CODES).mT, torch.zeros(CODES).mT], ValueError),
        (tensors(torch.int8, CODES, CODES), ValueError),
        (tensors(torch.float32, CODES, CODES, SCALES, SCALES), ValueError),
        ([*tensors(torch.int8, CODES, CODES), torch.zeros(SCALES), torch.zeros(SCALES)], TypeError),
        (tensors(torch.int8, CODES, CODES, SCALES, (2, 1, 7)), ValueError),
        (tensors(torch.uint8, CODES, CODES, SCALES, SCALES), ValueError),
    ],
    ids=[
        "dimensions", "shapes", "two dtypes", "integers", "strides", "no scales", "needless scales",
        "dtype of scales", "shape of scales", "no offsets",
    ],
)  # fmt: skip
def test_a_cache_that_does_not_fit_is_refused(
    parts: list[torch.Tensor], error: type[Exception]
) -> None:
    with pytest.raises(error):
        LayerCache(*parts)


def test_a_4_bit_cache_of_odd_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        LayerCache.allocate(KvFormat.INT4, 1, 1, 1, 63)
