"""The Triton rotation and store writes what its definition does, in every format."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.kv_codes import KvCodes, decode
from qserve.kernels.kv_store import kernel, reference
from qserve.kernels.kv_store.launch import StoreProblem, store_launch
from qserve.kernels.kv_store.rope import rope_table

HALF, BRAIN = torch.float16, torch.bfloat16
BLOCK_SIZE = 16
SLOTS = torch.tensor([17, -1, 3, 31]).int()
POSITIONS = torch.tensor([0, 5, 30, 7]).int()

Run = tuple[torch.Tensor, LayerCache]


def store(
    format: KvFormat,
    dtype: torch.dtype = HALF,
    shape: tuple[int, int, int] = (3, 2, 16),
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Run, Run]:
    """The queries, keys and values of four tokens and the cache, after the kernel and after the
    definition. shape: query heads, KV heads and their size."""
    num_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(head_dim)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    apart = torch.randn(4, width + 8, generator=generator).to(dtype)
    apart[0, -8 - head_dim : -8] = 0.0  # a value of zeros
    cos_sin = rope_table(rotary_dim or head_dim, 32, 100.0)
    results = []
    for is_kernel in (True, False):
        qkv = apart.clone()[:, :width]
        kv = LayerCache.allocate(format, 2, num_kv_heads, BLOCK_SIZE, head_dim)
        if is_kernel:
            problem = StoreProblem(
                4, num_heads, num_kv_heads, head_dim, cos_sin.size(1), BLOCK_SIZE, format,
                interleaved=interleaved,
            )  # fmt: skip
            kernel.run(qkv, (POSITIONS, SLOTS, cos_sin), kv, store_launch(problem))
        else:
            reference.rope_and_store(qkv, POSITIONS, cos_sin, kv, SLOTS, interleaved)
        results.append((qkv, kv))
    return results[0], results[1]


def turned_apart(found: Run, expected: Run) -> float:
    """The largest difference of queries, keys and values, in steps of their dtype at 4."""
    step = torch.finfo(found[0].dtype).eps * 4
    return float(((found[0].float() - expected[0].float()).abs() / step).max())


def cache_parts(kv: LayerCache) -> list[tuple[torch.Tensor, ...]]:
    parts = ((kv.k, kv.k_scales, kv.k_offsets), (kv.v, kv.v_scales, kv.v_offsets))
    return [tuple(part for part in parts if part is not None) for parts in parts]


def values_apart(found: Run, expected: Run) -> bool:
    """Whether what the caches stand for differs anywhere but where a rotated key differed by one
    rounding, by more than the code and the scale that follow from it."""
    dtype, format = found[0].dtype, found[1].format
    for mine, theirs in zip(cache_parts(found[1]), cache_parts(expected[1]), strict=True):
        decoded = [decode(KvCodes(*part), format) for part in (mine, theirs)]
        step = theirs[1].float().max() if format.has_scales else 0.0
        allowed = torch.finfo(dtype).eps * 4 + step * (1.01 if format.has_scales else 0)
        if float((decoded[0] - decoded[1]).abs().max()) > float(allowed):
            return True
    return False


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("format", [f for f in KvFormat if f is not KvFormat.FLOAT32])
def test_what_is_stored_is_what_the_definition_stores(format: KvFormat, dtype: torch.dtype) -> None:
    found, expected = store(format, dtype)
    assert turned_apart(found, expected) < 1
    assert not values_apart(found, expected)
    # Values are not turned: nothing can have been rounded otherwise.
    for mine, theirs in zip(cache_parts(found[1])[1], cache_parts(expected[1])[1], strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize(
    ("format", "shape"),
    [
        (KvFormat.INT4, (1, 1, 80)),
        (KvFormat.INT8, (9, 3, 96)),
        *(
            pytest.param(format, shape, marks=pytest.mark.slow)
            for format in (KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4)
            for shape in ((2, 1, 64), (5, 3, 96), (9, 3, 128), (1, 1, 256))
        ),
    ],
)
def test_any_head_fits(format: KvFormat, shape: tuple[int, int, int]) -> None:
    found, expected = store(format, shape=shape)
    assert turned_apart(found, expected) < 1
    assert not values_apart(found, expected)
    for mine, theirs in zip(cache_parts(found[1])[1], cache_parts(expected[1])[1], strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 12])
def test_pairs_lie_apart_or_side_by_side_and_some_stay(rotary_dim: int, interleaved: bool) -> None:
    found, expected = store(
        KvFormat.FLOAT16, HALF, (2, 1, 32), rotary_dim=rotary_dim, interleaved=interleaved
    )
    assert turned_apart(found, expected) < 1
    other, _ = store(KvFormat.FLOAT16, HALF, (2, 1, 32), rotary_dim, not interleaved)
    assert turned_apart(other, expected) > 2


def test_a_code_off_by_one_is_noticed() -> None:
    found, expected = store(KvFormat.INT8)
    found[1].k[1, 0, 1, 3] += 2 if found[1].k[1, 0, 1, 3] < 100 else -2
    assert values_apart(found, expected)


def test_a_head_that_is_not_a_number_has_no_scale() -> None:
    qkv = torch.randn(1, 3 * 16).half()
    qkv[0, 40] = float("nan")
    kv = LayerCache.allocate(KvFormat.INT8, 1, 1, BLOCK_SIZE, 16)
    problem = StoreProblem(1, 1, 1, 16, 16, BLOCK_SIZE, KvFormat.INT8)
    places = (torch.tensor([0]).int(), torch.tensor([2]).int(), rope_table(16, 4, 100.0))
    kernel.run(qkv, places, kv, store_launch(problem))
    assert kv.v_scales is not None and kv.k_scales is not None
    assert bool(kv.v_scales[0, 0, 2].isnan()) and bool(kv.k_scales[0, 0, 2].isfinite())
