"""The definition of rotating a step's queries and keys and storing its keys and values, in plain
PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.kv_codes import encode


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: LayerCache,
    slot_mapping: torch.Tensor,
    interleaved: bool,
) -> None:
    """Rotates q and k inside ``qkv`` and writes k and v to the slots; see the public op."""
    heads = qkv.unflatten(1, (-1, kv.head_dim))  # a view: [T, H + 2 KVH, D]
    rotated = heads[:, : -kv.num_kv_heads, : cos_sin.size(1)]
    cos, sin = cos_sin[positions.long()][:, None].chunk(2, dim=2)
    if interleaved:
        first, second = rotated[..., ::2].float(), rotated[..., 1::2].float()
    else:
        first, second = rotated.float().chunk(2, dim=2)
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated.copy_(torch.stack(turned, dim=3).flatten(2) if interleaved else torch.cat(turned, 2))
    stored = slot_mapping >= 0
    slots = slot_mapping[stored].long()
    keys = heads[stored, -2 * kv.num_kv_heads : -kv.num_kv_heads]
    values = heads[stored, -kv.num_kv_heads :]
    _store(keys, kv, (kv.k, kv.k_scales, kv.k_offsets), slots)
    _store(values, kv, (kv.v, kv.v_scales, kv.v_offsets), slots)


def _store(
    rows: torch.Tensor,
    kv: LayerCache,
    to: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    slots: torch.Tensor,
) -> None:
    blocks, offsets = slots // kv.block_size, slots % kv.block_size
    for numbers, target in zip(encode(rows, kv.format), to, strict=True):
        if numbers is not None and target is not None:
            target[blocks, :, offsets] = numbers
