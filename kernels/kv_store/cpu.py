"""The native rotation and store."""

from __future__ import annotations

import torch

from qserve.kernels.kv_cache import LayerCache
from qserve.kernels.native import extension


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: LayerCache,
    slot_mapping: torch.Tensor,
    interleaved: bool,
) -> None:
    """Rotates q and k inside ``qkv`` and writes k and v to the slots; see the public op."""
    extension().rope_and_store(
        qkv.data_ptr(),
        qkv.stride()[0],
        qkv.shape[0],
        qkv.shape[1],
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        cos_sin.data_ptr(),
        *cos_sin.shape,
        interleaved,
        kv.handle,
    )
