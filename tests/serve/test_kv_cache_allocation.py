"""How many blocks are planned, and what is said when they are too few."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qserve.kernels.kv_cache import KvFormat
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.config import EngineConfig
from qserve.serve.errors import KVCacheTooSmall, StartupError
from qserve.serve.kv_cache_allocation import (
    KVCachePlan,
    allocate_kv_cache,
    bytes_per_token,
    free_memory,
    plan_kv_cache,
)
from qserve.serve.model_runner import kv_format_of
from qserve.serve.models.llama_config import LlamaConfig

MODEL = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_positions=1024,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_embeddings=False,
    windows=(None, None),
)
CONFIG = EngineConfig(max_num_seqs=4, block_size=16)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 2  # k and v, layers, heads, head_dim, float16
FULL = 4 * 1024 * TOKEN_BYTES


def test_a_token_takes_keys_and_values_of_every_layer_and_head() -> None:
    assert bytes_per_token(MODEL, CONFIG) == TOKEN_BYTES


@pytest.mark.parametrize(
    ("format", "row_bytes"),
    [(KvFormat.FLOAT32, 64), (KvFormat.INT8, 16 + 2), (KvFormat.INT4, 8 + 2 + 2)],
)
def test_a_token_takes_its_scales_and_offsets_too(format: KvFormat, row_bytes: int) -> None:
    config = replace(CONFIG, kv_format=format)
    assert bytes_per_token(MODEL, config) == 2 * 2 * 2 * row_bytes
    caches = allocate_kv_cache(MODEL, KVCachePlan(3, 16, 48), format)
    parts = [(c.k, c.v, c.k_scales, c.v_scales, c.k_offsets, c.v_offsets) for c in caches]
    allocated = sum(part.nbytes for layer in parts for part in layer if part is not None)
    assert allocated == 3 * 16 * bytes_per_token(MODEL, config)


def test_no_more_is_planned_than_full_batches_of_full_length_need() -> None:
    plan = plan_kv_cache(MODEL, CONFIG, free_bytes=100 * FULL)
    assert plan == KVCachePlan(num_blocks=4 * 64, block_size=16, max_model_len=1024)


def test_half_of_the_free_memory_is_taken_at_most() -> None:
    plan = plan_kv_cache(MODEL, CONFIG, free_bytes=FULL)
    assert plan.num_blocks == 2 * 64


def test_memory_that_was_asked_for_is_used() -> None:
    config = replace(CONFIG, kv_cache_bytes=100 * 16 * TOKEN_BYTES + 5)
    assert plan_kv_cache(MODEL, config, free_bytes=0).num_blocks == 100


def test_a_shorter_context_needs_fewer_blocks() -> None:
    plan = plan_kv_cache(MODEL, replace(CONFIG, max_model_len=100), free_bytes=100 * FULL)
    assert plan == KVCachePlan(num_blocks=4 * 7, block_size=16, max_model_len=100)


def test_a_context_that_was_asked_for_and_does_not_fit_is_refused_with_the_largest_that_does() -> (
    None
):
    config = replace(CONFIG, max_model_len=1000, kv_cache_bytes=20 * 16 * TOKEN_BYTES)
    with pytest.raises(KVCacheTooSmall, match="set max_model_len to 320"):
        plan_kv_cache(MODEL, config, free_bytes=0)


def test_a_context_that_was_not_asked_for_is_lowered_to_what_fits() -> None:
    config = replace(CONFIG, kv_cache_bytes=20 * 16 * TOKEN_BYTES)
    plan = plan_kv_cache(MODEL, config, free_bytes=0)
    assert plan == KVCachePlan(num_blocks=20, block_size=16, max_model_len=320)


@pytest.mark.parametrize("free_bytes", [100, 0, -(1 << 30)])  # below 0: the weights do not fit
def test_no_memory_at_all_is_refused(free_bytes: int) -> None:
    with pytest.raises(KVCacheTooSmall, match=r"there are (0|50): give the KV cache more memory"):
        plan_kv_cache(MODEL, CONFIG, free_bytes)


@pytest.mark.parametrize("length", [0, 1, 1025])
def test_a_context_that_the_model_does_not_have_is_refused(length: int) -> None:
    with pytest.raises(StartupError, match="2 to 1024"):
        plan_kv_cache(MODEL, replace(CONFIG, max_model_len=length), free_bytes=FULL)


def test_a_cache_that_nobody_uses_takes_no_memory() -> None:
    huge = free_memory() * 4 // bytes_per_token(MODEL, CONFIG) // 16
    assert len(allocate_kv_cache(MODEL, KVCachePlan(huge, 16, 1024), KvFormat.INT8)) == 2


def test_there_is_some_free_memory() -> None:
    assert free_memory() > 1 << 20


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (None, KvFormat.FLOAT16),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, KvFormat.FLOAT8),
        ({"num_bits": 8, "type": "int", "strategy": "tensor"}, KvFormat.INT8),
        ({"num_bits": 4, "type": "float", "strategy": "tensor_group"}, KvFormat.FLOAT16),
    ],
)
def test_a_checkpoint_made_for_an_8_bit_cache_is_served_with_one(
    scheme: dict[str, object] | None, expected: KvFormat, tmp_path: Path
) -> None:
    block = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    assert kv_format_of(Checkpoint(tmp_path)) is expected
