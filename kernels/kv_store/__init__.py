"""Rotary positions for a step's queries and keys, and its keys and values into the cache."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.kv_store import cpu, reference
from qserve.kernels.kv_store.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    rope_table,
)
from qserve.kernels.rows import check_rows

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "RopeScaling",
    "YarnScaling",
    "rope_and_store",
    "rope_table",
]


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: LayerCache,
    slot_mapping: torch.Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Rotates queries and keys in place and stores keys and values in the format of the cache.

    qkv: ``[T, (H + 2 KVH) * D]`` with contiguous rows: the query heads, the key heads, the value
    heads. cos_sin: float32 ``[max_positions, R]`` from ``rope_table``; the first ``R <= D``
    elements of a head are rotated, the others stay. Elements ``i`` and ``i + R/2`` (Llama), or
    ``2 i`` and ``2 i + 1`` if ``interleaved`` (the RoFormer paper), ``a`` and ``b``, become
    ``a * cos - b * sin`` and ``b * cos + a * sin`` with the angle of column ``i`` of
    ``cos_sin[positions[t]]``. positions, slot_mapping: int32 ``[T]``; a token with a negative slot
    is not stored. Raises ``ValueError`` for shapes, positions or slots and ``TypeError`` for dtypes
    that do not fit.
    """
    width = qkv.size(-1)
    check_rows("qkv", qkv, width)
    head_dim = kv.head_dim
    if width % head_dim or width <= 2 * kv.num_kv_heads * head_dim:
        raise ValueError(
            f"qkv has {width} columns, expected (heads + 2 * {kv.num_kv_heads}) * {head_dim}"
        )
    if cos_sin.dtype is not torch.float32 or not cos_sin.is_contiguous():
        raise TypeError(f"cos_sin is {cos_sin.dtype}, expected contiguous float32")
    if cos_sin.dim() != 2 or cos_sin.size(1) > head_dim or cos_sin.size(1) % 2:
        raise ValueError(
            f"cos_sin has shape {tuple(cos_sin.shape)}, expected [*, {head_dim}] or a smaller even "
            "number of columns"
        )
    for name, indices in (("positions", positions), ("slot_mapping", slot_mapping)):
        if indices.dtype is not torch.int32:
            raise TypeError(f"{name} is {indices.dtype}, expected int32")
        if indices.dim() != 1 or indices.size(0) != qkv.size(0) or not indices.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(indices.shape)}, expected [{qkv.size(0)}]")
    backend = choose("kv_store", qkv.device).backend
    if backend is Backend.CPU:
        cpu.rope_and_store(qkv, positions, cos_sin, kv, slot_mapping, interleaved)
    elif backend is Backend.TRITON:
        load_kernel("kv_store").rope_and_store(
            qkv, positions, cos_sin, kv, slot_mapping, interleaved
        )
    else:
        reference.rope_and_store(qkv, positions, cos_sin, kv, slot_mapping, interleaved)
