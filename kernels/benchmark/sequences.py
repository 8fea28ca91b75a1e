"""Attention over the paged cache, and what is written to it, in every format of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from qserve.kernels.benchmark.case import Case, ModelShapes, Workload, num_copies, randn
from qserve.kernels.cost import Cost
from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.kv_store import rope_and_store, rope_table
from qserve.kernels.paged_attention import Scoring, paged_attention

FORMATS = (KvFormat.FLOAT16, KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4)
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 16, 64
STEP_ROWS = 8  # sequences that are decoded together
ROPE_THETA = 10_000.0


def attention_cases(shapes: ModelShapes) -> Iterator[Case]:
    """Decode steps of one and of several sequences, and a prompt."""
    for kv_format in FORMATS:
        for context in shapes.contexts:
            for num_sequences in (1, STEP_ROWS):
                name = f"{kv_format.value}, decode {num_sequences} x {context}"
                build = partial(_attend, shapes, kv_format, num_sequences, 1, context)
                yield Case("paged_attention", name, build)
        rows = shapes.rows[-1]
        build = partial(_attend, shapes, kv_format, 1, rows, rows)
        yield Case("paged_attention", f"{kv_format.value}, prefill {rows}", build)


def store_cases(shapes: ModelShapes) -> Iterator[Case]:
    """The rotation and storing of a decode step and of a prompt."""
    for kv_format in FORMATS:
        for rows in (shapes.rows[0], shapes.rows[-1]):
            build = partial(_store, shapes, kv_format, rows)
            yield Case("kv_store", f"{kv_format.value}, {rows} rows", build)


def _attend(
    shapes: ModelShapes,
    kv_format: KvFormat,
    num_sequences: int,
    rows: int,
    context: int,
    device: torch.device,
) -> Workload:
    block_size = _block_size(device)
    blocks_each = -(-context // block_size)
    num_blocks = num_sequences * blocks_each
    row_bytes = 2 * shapes.num_kv_heads * kv_format.row_bytes(shapes.head_dim)
    caches = [
        _cache(shapes, kv_format, num_blocks, device)
        for _ in range(num_copies(num_blocks * block_size * row_bytes))
    ]
    order = torch.randperm(num_blocks).int().view(num_sequences, blocks_each)
    lengths = torch.full((num_sequences,), context, dtype=torch.int32, device=device)
    starts = (rows * torch.arange(num_sequences + 1)).int().to(device)
    q = randn(device, num_sequences * rows, shapes.num_heads * shapes.head_dim)
    tables, out = order.to(device), torch.empty_like(q)
    scoring = Scoring(shapes.head_dim**-0.5)
    pairs = num_sequences * sum(range(context - rows + 1, context + 1))
    return Workload(
        call=lambda i: paged_attention(
            q, caches[i % len(caches)], tables, lengths, starts, scoring, out=out
        ),
        cost=Cost(
            num_bytes=num_sequences * context * row_bytes + q.nbytes + out.nbytes,
            flops=4 * pairs * shapes.num_heads * shapes.head_dim,
        ),
    )


def _store(shapes: ModelShapes, kv_format: KvFormat, rows: int, device: torch.device) -> Workload:
    block_size = _block_size(device)
    cache = _cache(shapes, kv_format, -(-rows // block_size), device)
    qkv = randn(device, rows, shapes.qkv)
    table = rope_table(shapes.head_dim, rows, ROPE_THETA).to(device)
    places = torch.arange(rows, dtype=torch.int32, device=device)
    written = rows * 2 * shapes.num_kv_heads * kv_format.row_bytes(shapes.head_dim)
    num_rotated = rows * (shapes.num_heads + shapes.num_kv_heads) * shapes.head_dim
    return Workload(
        call=lambda _: rope_and_store(qkv, places, table, cache, places),
        cost=Cost(qkv.nbytes + num_rotated * qkv.itemsize + written, 3 * num_rotated),
    )


def _cache(
    shapes: ModelShapes, kv_format: KvFormat, num_blocks: int, device: torch.device
) -> LayerCache:
    cache = LayerCache.allocate(
        kv_format,
        num_blocks,
        shapes.num_kv_heads,
        _block_size(device),
        shapes.head_dim,
        device,
    )
    for codes in (cache.k, cache.v):  # any bytes will do, but pages must have been written
        codes.view(torch.uint8).fill_(1)
    return cache


def _block_size(device: torch.device) -> int:
    return GPU_BLOCK_SIZE if device.type == "cuda" else CPU_BLOCK_SIZE
