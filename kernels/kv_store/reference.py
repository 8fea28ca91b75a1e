"""The definition of rotating a step's queries and keys and storing its keys and values, in plain
PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.kv_cache import LayerCache


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: LayerCache,
    slot_mapping: torch.Tensor,
) -> None:
    """Rotates q and k inside ``qkv`` and writes k and v to the slots; see the public op."""
    head_dim = kv.head_dim
    heads = qkv.unflatten(1, (-1, head_dim))  # a view: [T, H + 2 KVH, D]
    rotated = heads[:, : -kv.num_kv_heads]
    cos, sin = cos_sin[positions.long()][:, None].chunk(2, dim=2)
    first, second = rotated.float().chunk(2, dim=2)
    rotated.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2))
    stored = slot_mapping >= 0
    slots = slot_mapping[stored].long()
    blocks, offsets = slots // kv.block_size, slots % kv.block_size
    keys = heads[stored, -2 * kv.num_kv_heads : -kv.num_kv_heads]
    values = heads[stored, -kv.num_kv_heads :]
    kv.k[blocks, :, offsets] = keys.to(kv.k.dtype)
    kv.v[blocks, :, offsets] = values.to(kv.v.dtype)
