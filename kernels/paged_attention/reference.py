"""The definition of attention over a paged cache in plain PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.kv_cache import LayerCache


def paged_attention(
    q: torch.Tensor,
    kv: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Writes the attention output of every query row to ``out``, one sequence after the other; see
    the public op."""
    starts = cu_seqlens_q.tolist()
    for index, context in enumerate(context_lens.tolist()):
        start, stop = starts[index], starts[index + 1]
        if start == stop:
            continue
        num_blocks = -(-context // kv.block_size)
        blocks = block_tables[index, :num_blocks].long()
        keys, values = (_gather(cache, blocks, context) for cache in (kv.k, kv.v))
        queries = q[start:stop].float().unflatten(1, (kv.num_kv_heads, -1, kv.head_dim))
        scores = torch.einsum("qhgd,hkd->hgqk", queries, keys) * scale
        rows = torch.arange(stop - start, device=q.device)[:, None] + context - (stop - start)
        hidden = torch.arange(context, device=q.device)[None, :] > rows
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start:stop] = torch.einsum("hgqk,hkd->qhgd", weights, values).flatten(1).to(out.dtype)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, context: int) -> torch.Tensor:
    # [blocks, heads, block_size, D] -> [heads, context, D]
    return cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context].float()
