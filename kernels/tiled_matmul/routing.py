"""Rows dealt out to experts in whole tiles, on the device that holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.tiled_matmul.launch import count_tiles


@dataclass(frozen=True, slots=True)
class Routing:
    """Which rows go to which expert, a tile at a time.

    slots: int32 ``[num_tiles * block_m]``, rows of the result by expert and in their order; the
    number of rows where a tile has none. tile_experts: int32 ``[num_tiles]``; a tile without rows
    has any expert. row_experts: int32 ``[num_rows]``. rows_per_token: rows of the result that read
    the same row of activations.
    """

    slots: torch.Tensor
    tile_experts: torch.Tensor
    row_experts: torch.Tensor
    rows_per_token: int


def share_rows(
    expert_ids: torch.Tensor, num_experts: int, block_m: int, rows_per_token: int
) -> Routing:
    """Tiles of ``block_m`` rows, each of one expert, that hold every row once.

    expert_ids: int32 ``[M, top_k]``, the expert of each row of the result. There are as many tiles
    as any ids could need, so nothing has to be known on the host: no wait for the device.
    """
    experts = expert_ids.flatten().long()
    num_rows, device = experts.numel(), experts.device
    order = experts.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    tiles = (counts + block_m - 1) // block_m
    tile_ends = tiles.cumsum(0)
    # A row's place is its expert's first tile, then its turn among that expert's rows.
    shifts = (tile_ends - tiles) * block_m - (counts.cumsum(0) - counts)
    places = torch.arange(num_rows, device=device) + shifts[experts[order]]
    num_tiles = count_tiles(num_rows, num_experts, block_m)
    slots = torch.full((num_tiles * block_m,), num_rows, dtype=torch.int32, device=device)
    slots[places] = order.int()
    numbers = torch.arange(num_tiles, device=device)
    tile_experts = torch.searchsorted(tile_ends, numbers, right=True).clamp(max=num_experts - 1)
    return Routing(slots, tile_experts.int(), experts.int(), rows_per_token)
