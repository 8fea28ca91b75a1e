"""The Triton kernels against their definitions on a real GPU, as the engine calls them."""

from __future__ import annotations

import pytest
import torch

from qserve.kernels.backend import Backend, choose
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul import int4_matmul, prepare
from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.paged_attention import Scoring, paged_attention, reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)
SHAPES = ((4096, 4096), (28672, 4096), (576, 1536), (100, 576))
BLOCK_SIZE = 64


@pytest.fixture
def device() -> torch.device:
    """The GPU that the tests run on."""
    return torch.device("cuda", torch.cuda.current_device())


def make_weight(num_outputs: int, num_inputs: int, group_size: int) -> GroupedWeight:
    generator = torch.Generator().manual_seed(num_inputs + num_outputs)
    groups = (num_outputs, num_inputs // group_size)
    return GroupedWeight(
        codes=torch.randint(0, 16, (num_outputs, num_inputs), generator=generator).byte(),
        scales=(0.01 + 0.02 * torch.rand(groups, generator=generator)).half(),
        zero_points=torch.randint(0, 16, groups, generator=generator).byte(),
        bits=4,
        group_size=group_size,
    )


def make_rows(num_rows: int, num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, num_inputs, generator=generator).to(dtype)


def make_cache(
    contexts: list[int], heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[LayerCache, torch.Tensor]:
    """A cache full of noise, NaN past the end of each sequence, and its block tables."""
    blocks = [-(-context // BLOCK_SIZE) for context in contexts]
    generator = torch.Generator().manual_seed(sum(contexts))
    order = torch.randperm(sum(blocks), generator=generator).int()
    tables = torch.zeros(len(contexts), max(blocks), dtype=torch.int32)
    shape = (sum(blocks), heads, BLOCK_SIZE, head_dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    for i, context in enumerate(contexts):
        tables[i, : blocks[i]] = order[sum(blocks[:i]) : sum(blocks[: i + 1])]
        if context % BLOCK_SIZE:
            for cache in (k, v):
                cache[int(tables[i, blocks[i] - 1]), :, context % BLOCK_SIZE :] = float("nan")
    return LayerCache(k, v), tables


@pytest.mark.parametrize("op", ["int4_matmul", "paged_attention"])
def test_triton_runs_the_op(op: str, device: torch.device) -> None:
    assert choose(op, device).backend is Backend.TRITON


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 17, 64, 300])
def test_the_int4_matmul_computes_what_the_weight_stands_for(
    num_rows: int,
    shape: tuple[int, int],
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    weight = make_weight(*shape, group_size)
    x = make_rows(num_rows, shape[1], dtype)
    out = int4_matmul(x.to(device), prepare(weight, device)).cpu().double()
    dense = weight.dequantize().double()
    expected = x.double() @ dense.T
    magnitude = x.double().abs() @ dense.abs().T
    # One rounding of the result; float16 weights may be rounded after scaling; float32 sums.
    allowed = torch.finfo(dtype).eps / 2 * expected.abs() + 2**-11 * magnitude
    assert bool(((out - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 128])
def test_a_row_of_the_int4_matmul_is_the_same_in_every_batch(
    group_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    weight = prepare(make_weight(2048, 4096, group_size), device)
    x = make_rows(300, 4096, dtype).to(device)
    row = int4_matmul(x[:1], weight)
    for num_rows in (16, 32, 64, 300):
        assert torch.equal(int4_matmul(x[:num_rows], weight)[:1], row)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (8, 8, 64), (32, 1, 128)])
@pytest.mark.parametrize("num_queries", [[1, 1, 1, 1], [1, 200, 1, 33]])
def test_paged_attention_computes_its_definition(
    num_queries: list[int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    contexts = [1500, 200, 64, 1001]
    kv, tables = make_cache(contexts, num_kv_heads, head_dim, dtype)
    starts = torch.tensor([0, *num_queries]).cumsum(0).int()
    lengths = torch.tensor(contexts).int()
    q = make_rows(sum(num_queries), num_heads * head_dim, dtype)
    scale = head_dim**-0.5
    expected = torch.empty(q.shape)
    wide = LayerCache(kv.k.float(), kv.v.float())
    reference.paged_attention(q.float(), wide, tables, lengths, starts, Scoring(scale), expected)
    moved = LayerCache(kv.k.to(device), kv.v.to(device))
    tables, lengths, starts = (tensor.to(device) for tensor in (tables, lengths, starts))
    out = paged_attention(q.to(device), moved, tables, lengths, starts, Scoring(scale))
    out = out.cpu().float()
    # A mean of values up to about 4, whose weights are rounded to the dtype, rounded once more.
    assert float((out - expected).abs().max()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_row_is_the_same_alone_and_in_a_batch(
    dtype: torch.dtype, device: torch.device
) -> None:
    contexts = [1500] + [70] * 600  # enough sequences that segments are merged in registers
    kv, tables = make_cache(contexts, 2, 64, dtype)
    kv = LayerCache(kv.k.to(device), kv.v.to(device))
    q = make_rows(len(contexts), 8 * 64, dtype).to(device)
    tables, lengths = tables.to(device), torch.tensor(contexts).int().to(device)
    starts = torch.arange(len(contexts) + 1, device=device).int()
    batch = paged_attention(q, kv, tables, lengths, starts, Scoring(0.125))
    alone = paged_attention(q[:1], kv, tables[:1], lengths[:1], starts[:2], Scoring(0.125))
    assert torch.equal(batch[:1], alone)
