"""Inputs that are grouped in another order than they come in (GPTQ's ``desc_act``)."""

from __future__ import annotations

import torch

from qserve.quant.errors import CheckpointError, UnsupportedModelError


def order_by_group(layer: str, group_index: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """The order of the inputs that makes groups contiguous: ``input_order`` of a grouped weight.

    group_index: integers ``[K]``, the group of each input. Returns int64 ``[K]``, stable within a
    group, or None when the inputs are in that order already.
    Raises ``CheckpointError`` for a group that does not exist, ``UnsupportedModelError`` for groups
    of unequal size.
    """
    index = group_index.long()
    num_groups = len(index) // group_size
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= num_groups):
        raise CheckpointError(
            f"{layer}: g_idx spans [{int(index.min())}, {int(index.max())}], expected groups 0 to "
            f"{num_groups - 1}: the file is damaged"
        )
    if not bool((index.bincount(minlength=num_groups) == group_size).all()):
        raise UnsupportedModelError(
            f"{layer}: g_idx gives its groups different numbers of inputs, expected {group_size} "
            "each: this cannot be read"
        )
    if bool((index.diff() >= 0).all()):
        return None
    return index.argsort(stable=True)


def group_index(in_features: int, group_size: int, order: torch.Tensor | None) -> torch.Tensor:
    """``g_idx`` for an ``input_order``: int32 ``[K]``, the group of each input."""
    sorted_groups = torch.arange(in_features, dtype=torch.int32) // group_size
    if order is None:
        return sorted_groups
    index = torch.empty_like(sorted_groups)
    index[order] = sorted_groups
    return index
