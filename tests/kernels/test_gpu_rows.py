"""The Triton kernels of rows, of the quantized cache and of sampling on a real GPU."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from qserve.kernels.backend import Backend, choose
from qserve.kernels.gated_activation import Gate, gated_activation
from qserve.kernels.gated_activation import reference as gated_reference
from qserve.kernels.head_norm import head_norm
from qserve.kernels.head_norm import reference as head_reference
from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.kv_store import reference as store_reference
from qserve.kernels.kv_store import rope_and_store, rope_table
from qserve.kernels.layer_norm import layer_norm
from qserve.kernels.layer_norm import reference as layer_reference
from qserve.kernels.paged_attention import Scoring, paged_attention, reference
from qserve.kernels.rms_norm import reference as rms_reference
from qserve.kernels.rms_norm import rms_norm
from qserve.kernels.rms_norm_int8 import rms_norm_int8
from qserve.kernels.sample import SamplingBatch, sample_tokens
from qserve.kernels.sample import reference as sample_reference
from qserve.kernels.soft_cap import reference as cap_reference
from qserve.kernels.soft_cap import soft_cap

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)
FORMATS = (KvFormat.BFLOAT16, KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4)
OPS = (
    "gated_activation", "head_norm", "kv_store", "layer_norm", "paged_attention", "rms_norm",
    "rms_norm_int8", "sample", "soft_cap",
)  # fmt: skip
BLOCK_SIZE = 64


@pytest.fixture
def device() -> torch.device:
    """The GPU that the tests run on."""
    return torch.device("cuda", torch.cuda.current_device())


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def steps_apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in steps of the dtype at the size of the result."""
    steps = torch.finfo(found.dtype).eps * expected.float().abs().clamp(min=2**-6)
    return float(((found.float() - expected.float()).abs() / steps).nan_to_num(nan=1e9).max())


def on(device: torch.device, kv: LayerCache) -> LayerCache:
    parts = (kv.k, kv.v, kv.k_scales, kv.v_scales, kv.k_offsets, kv.v_offsets)
    k, v, *numbers = (None if part is None else part.to(device) for part in parts)
    assert k is not None and v is not None
    return LayerCache(k, v, *numbers)


def filled_cache(
    format: KvFormat, num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[LayerCache, torch.Tensor]:
    """A cache with ``num_tokens`` stored by the definition, and its queries ``[T, H * D]``."""
    num_heads, num_kv_heads, head_dim = heads
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    kv = LayerCache.allocate(format, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    positions = torch.arange(num_tokens).int()
    table = rope_table(head_dim, num_tokens, 10000.0)
    store_reference.rope_and_store(qkv, positions, table, kv, positions, False)
    return kv, qkv[:, : num_heads * head_dim]


@pytest.mark.parametrize("op", OPS)
def test_triton_runs_the_op(op: str, device: torch.device) -> None:
    assert choose(op, device).backend is Backend.TRITON


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 4096, 14336])
def test_norms_are_their_definitions(width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = random(17, width, dtype=dtype), random(width), random(width + 1)[:width]
    residuals = [random(17, width, dtype=dtype) for _ in range(2)]
    expected, moved = torch.empty_like(x), residuals[1].to(device)
    rms_reference.rms_norm(x, weight, 1e-5, residuals[0], 1.0, expected)
    found = rms_norm(x.to(device), weight.to(device), 1e-5, residual=moved, weight_offset=1.0)
    assert steps_apart(found.cpu(), expected) <= 1
    assert torch.equal(moved.cpu(), residuals[0])
    layer_reference.layer_norm(x, weight, bias, 1e-5, None, expected)
    found = layer_norm(x.to(device), weight.to(device), bias.contiguous().to(device), 1e-5)
    assert steps_apart(found.cpu(), expected) <= 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(32, 128), (9, 80)])
def test_the_norm_of_heads_and_the_soft_cap_are_their_definitions(
    num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = random(17, num_heads * head_dim, dtype=dtype), random(head_dim)
    expected = torch.empty_like(x)
    head_reference.head_norm(x, weight, 1e-5, 1.0, expected)
    found = head_norm(x.to(device), weight.to(device), 1e-5, weight_offset=1.0)
    assert steps_apart(found.cpu(), expected) <= 1
    cap_reference.soft_cap(20 * x, 30.0, expected)
    assert steps_apart(soft_cap(20 * x.to(device), 30.0).cpu(), expected) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rounded_norm_is_near_the_norm(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(9, 4096, dtype=dtype).to(device), random(4096).to(device)
    codes, scales = rms_norm_int8(x, weight, 1e-5)
    wide = torch.empty(x.shape, device=device)
    rms_reference.rms_norm(x, weight, 1e-5, None, 0.0, wide)
    off = (codes.float() * scales[:, None] - wide).abs() / scales[:, None]
    assert float(off.max()) < 0.501


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", Gate)
def test_the_gated_activation_is_its_definition(
    activation: Gate, dtype: torch.dtype, device: torch.device
) -> None:
    gate_up = random(33, 2 * 14336, dtype=dtype)
    expected = torch.empty(33, 14336, dtype=dtype)
    gated_reference.gated_activation(gate_up, activation, expected)
    assert steps_apart(gated_activation(gate_up.to(device), activation).cpu(), expected) <= 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (8, 8, 80), (4, 2, 256)])
def test_what_is_stored_is_what_the_definition_stores(
    heads: tuple[int, int, int], format: KvFormat, device: torch.device
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    qkv = random(100, (num_heads + 2 * num_kv_heads) * head_dim, dtype=torch.bfloat16)
    places, table = torch.arange(100).int(), rope_table(head_dim, 100, 10000.0)
    kv = LayerCache.allocate(format, 2, num_kv_heads, BLOCK_SIZE, head_dim)
    moved, moved_qkv = on(device, kv), qkv.to(device)
    rope_and_store(moved_qkv, places.to(device), table.to(device), moved, places.to(device))
    store_reference.rope_and_store(qkv, places, table, kv, places, False)
    assert float((moved_qkv.cpu().float() - qkv.float()).abs().max()) <= 2**-6
    # Values are not turned: nothing can have been rounded otherwise.
    for mine, theirs in ((moved.v, kv.v), (moved.v_scales, kv.v_scales)):
        if mine is not None and theirs is not None:
            assert torch.equal(mine.cpu().view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4])
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (8, 8, 80), (8, 8, 96), (4, 2, 256)])
@pytest.mark.parametrize("num_queries", [1, 70])
def test_attention_over_a_quantized_cache_is_its_definition(
    num_queries: int,
    heads: tuple[int, int, int],
    format: KvFormat,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    kv, q = filled_cache(format, 1001, heads, dtype)
    q = q[-num_queries:]
    tables = torch.arange(kv.num_blocks).int()[None]
    lengths, starts = torch.tensor([1001]).int(), torch.tensor([0, num_queries]).int()
    sinks = random(heads[0])
    expected = torch.empty(q.shape)
    for scoring in (
        Scoring(heads[2] ** -0.5),
        Scoring(heads[2] ** -0.5, window=300, soft_cap=20.0, sinks=sinks),
    ):
        reference.paged_attention(q.float(), kv, tables, lengths, starts, scoring, expected)
        moved = Scoring(
            scoring.scale,
            scoring.window,
            scoring.soft_cap,
            None if scoring.sinks is None else scoring.sinks.to(device),
        )
        indices = (tables.to(device), lengths.to(device), starts.to(device))
        found = paged_attention(q.to(device), on(device, kv), *indices, moved).cpu().float()
        assert float((found - expected).abs().max()) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("vocabulary", [32000, 151936])
@pytest.mark.parametrize(
    "settings", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 50, 0.95, 0.02), (1.2, 0, 0.9, 0.0)]
)
def test_the_tokens_are_those_of_the_definition(
    settings: tuple[float, int, float, float], vocabulary: int, device: torch.device
) -> None:
    temperature, top_k, top_p, min_p = settings
    logits = 2 * random(16, vocabulary)
    ones = torch.ones(16)
    batch = SamplingBatch(
        temperature=temperature * ones,
        top_k=torch.full((16,), top_k, dtype=torch.int32),
        top_p=top_p * ones,
        min_p=min_p * ones,
        repetition_penalty=ones,
        frequency_penalty=0 * ones,
        presence_penalty=0 * ones,
        uniforms=torch.linspace(0, 0.999, 16, dtype=torch.float64),
    )
    vectors: dict[str, Any] = {
        field.name: getattr(batch, field.name).to(device)
        for field in fields(batch)
        if field.name != "adjustments"
    }
    expected = sample_reference.sample_tokens(logits, batch)
    found = sample_tokens(logits.to(device), SamplingBatch(**vectors))
    assert torch.equal(found.cpu(), expected)
