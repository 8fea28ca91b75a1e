"""Causal attention of a ragged batch over the paged cache."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.paged_attention import cpu, reference
from qserve.kernels.paged_attention.scoring import Scoring
from qserve.kernels.rows import check_output, check_rows

__all__ = ["Scoring", "paged_attention"]


def paged_attention(
    q: torch.Tensor,
    kv: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scoring: Scoring,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h // (H / KVH)]) * v[j, h // (H / KVH)]``,
    with the window, soft cap and sinks of ``scoring``, over a cache of any format.

    One batch holds decode rows (one query of a sequence) and prefill chunks (several) side by side.
    Row ``i`` of sequence
    ``s``, which has ``n = cu_seqlens_q[s + 1] - cu_seqlens_q[s]`` rows here, sees positions
    ``j <= p = context_lens[s] - n + i``, with a window those ``j > p - window``.

    q: ``[T, H * D]`` with contiguous rows that may lie apart (a slice of qkv); ``H`` must be a
    multiple of KVH. block_tables: int32 ``[S, max_blocks]``, the blocks of each sequence in order.
    context_lens: int32 ``[S]``, tokens in the cache, those of this step included. cu_seqlens_q:
    int32 ``[S + 1]``, from 0 to T. out: ``[T, H * D]``, written and returned; must not overlap
    ``q``. Raises ``ValueError`` for shapes, blocks or lengths and ``TypeError`` for dtypes that do
    not fit.
    """
    width = q.size(-1)
    check_rows("q", q, width)
    if width % (kv.head_dim * kv.num_kv_heads):
        raise ValueError(
            f"q has {width} columns, expected a multiple of {kv.num_kv_heads} * {kv.head_dim}"
        )
    out = check_output(q, width, out)
    _check_batch(block_tables, context_lens, cu_seqlens_q)
    if scoring.sinks is not None and scoring.sinks.numel() * kv.head_dim != width:
        raise ValueError(
            f"there are {scoring.sinks.numel()} sinks for {width // kv.head_dim} query heads"
        )
    backend = choose("paged_attention", q.device).backend
    if backend is Backend.CPU:
        cpu.paged_attention(q, kv, block_tables, context_lens, cu_seqlens_q, scoring, out)
    elif backend is Backend.TRITON:
        kernel = load_kernel("paged_attention")
        kernel.paged_attention(q, kv, block_tables, context_lens, cu_seqlens_q, scoring, out)
    else:
        reference.paged_attention(q, kv, block_tables, context_lens, cu_seqlens_q, scoring, out)
    return out


def _check_batch(
    block_tables: torch.Tensor, context_lens: torch.Tensor, cu_seqlens_q: torch.Tensor
) -> None:
    num_sequences = context_lens.numel()
    if (
        (block_tables.dim(), context_lens.dim(), cu_seqlens_q.dim()) != (2, 1, 1)
        or block_tables.size(0) != num_sequences
        or cu_seqlens_q.size(0) != num_sequences + 1
    ):
        raise ValueError(
            f"block_tables {tuple(block_tables.shape)}, context_lens {tuple(context_lens.shape)} "
            f"and cu_seqlens_q {tuple(cu_seqlens_q.shape)}: expected [S, max_blocks], [S], [S + 1]"
        )
    for indices in (block_tables, context_lens, cu_seqlens_q):
        if indices.dtype is not torch.int32:
            raise TypeError(
                f"block_tables, lengths and starts must be int32, one is {indices.dtype}"
            )
        if not indices.is_contiguous():
            raise ValueError("block_tables, lengths and starts must be contiguous")
