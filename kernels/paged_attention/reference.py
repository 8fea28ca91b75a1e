"""The definition of attention over a paged cache in plain PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.kv_codes import KvCodes, decode
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
    """Writes the attention output of every query row to ``out``, one sequence after the other; see
    the public op."""
    starts = cu_seqlens_q.tolist()
    for index, context in enumerate(context_lens.tolist()):
        start, stop = starts[index], starts[index + 1]
        if start == stop:
            continue
        num_blocks = -(-context // kv.block_size)
        blocks = block_tables[index, :num_blocks].long()
        keys = _gather(kv, (kv.k, kv.k_scales, kv.k_offsets), blocks, context)
        values = _gather(kv, (kv.v, kv.v_scales, kv.v_offsets), blocks, context)
        queries = q[start:stop].float().unflatten(1, (kv.num_kv_heads, -1, kv.head_dim))
        weights = _weigh(torch.einsum("qhgd,hkd->hgqk", queries, keys), scoring)
        out[start:stop] = torch.einsum("hgqk,hkd->qhgd", weights, values).flatten(1).to(out.dtype)


def _weigh(scores: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """The softmax of dot products ``[KVH, G, rows, context]``; the last row sees all of them."""
    scores = scores * scoring.scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * (scores / scoring.soft_cap).tanh()
    num_rows, context = scores.shape[2:]
    rows = torch.arange(context - num_rows, context, device=scores.device)[:, None]
    positions = torch.arange(context, device=scores.device)
    hidden = positions > rows
    if scoring.window is not None:
        hidden |= positions <= rows - scoring.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if scoring.sinks is None:
        return scores.softmax(dim=-1)
    sinks = scoring.sinks.view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def _gather(
    kv: LayerCache,
    parts: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    blocks: torch.Tensor,
    context: int,
) -> torch.Tensor:
    # [blocks, heads, block_size, ...] -> [heads, context, ...], then to floats [heads, context, D]
    rows = (
        None if part is None else part[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
        for part in parts
    )
    codes, scales, offsets = rows
    assert codes is not None
    return decode(KvCodes(codes, scales, offsets), kv.format)
