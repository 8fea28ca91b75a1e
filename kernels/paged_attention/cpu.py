"""The native paged attention."""

from __future__ import annotations

import torch

from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.native import extension
from qserve.kernels.paged_attention.scoring import Scoring

HEAD_DIM_MULTIPLE = 16
"""Heads are walked in vectors of 16 lanes; other widths run on the reference."""


def can_attend(kv: LayerCache, scoring: Scoring) -> bool:
    """Whether the native kernel has this cache and scoring; the reference has all."""
    plain = (scoring.window, scoring.soft_cap, scoring.sinks) == (None, None, None)
    return kv.handle is not None and plain and kv.head_dim % HEAD_DIM_MULTIPLE == 0


def paged_attention(
    q: torch.Tensor,
    kv: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scoring: Scoring,
    out: torch.Tensor,
) -> None:
    """Writes the attention output of every query row to ``out``; see the public op."""
    extension().paged_attention(
        q.data_ptr(),
        q.stride()[0],
        q.shape[0],
        q.shape[1],
        kv.handle,
        block_tables.data_ptr(),
        block_tables.shape[1],
        context_lens.data_ptr(),
        cu_seqlens_q.data_ptr(),
        context_lens.shape[0],
        scoring.scale,
        out.data_ptr(),
        out.stride()[0],
    )
