"""The native paged attention."""

from __future__ import annotations

import torch

from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.native import extension
from qserve.kernels.paged_attention.scoring import Scoring


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
        scoring.window or 0,
        scoring.soft_cap or 0.0,
        0 if scoring.sinks is None else scoring.sinks.data_ptr(),
        out.data_ptr(),
        out.stride()[0],
    )
