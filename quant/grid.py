"""The values that the codes of a group can stand for, and rounding to the nearest of them.

A level is a code minus the zero point of its group: ``weight = level * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels.grouped_weight import GroupedWeight

MIN_SCALE = 2.0**-20
"""The smallest scale: 16 units of float16, so still exact to 6 %. A group of zeros has it too."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of groups of weights, of any matching shape ``[...]``.

    Both are float32 for arithmetic, but the scales hold float16 values (as they are stored, so that
    codes are chosen for the scale that a reader will see) and the zero points whole numbers of
    ``[0, 2**bits)``: zero is always on the grid.
    """

    scales: torch.Tensor
    zero_points: torch.Tensor
    bits: int

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1


def grid_over(low: torch.Tensor, high: torch.Tensor, bits: int) -> Grid:
    """The grid that spans ``[min(low, 0), max(high, 0)]`` for each group."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    max_code = (1 << bits) - 1
    scales = ((high - low) / max_code).clamp(min=MIN_SCALE).half().float()
    zero_points = (-low / scales).round_().clamp_(0, max_code)
    return Grid(scales, zero_points, bits)


def grid_over_all(weights: torch.Tensor, bits: int) -> Grid:
    """The grid from the least to the greatest weight of each group ``[..., group_size]``."""
    return grid_over(weights.amin(-1), weights.amax(-1), bits)  # aminmax takes 8 times as long


def nearest_levels(
    weights: torch.Tensor, grid: Grid, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The nearest levels of ``weights [..., group_size]``: whole numbers in float32."""
    levels = torch.div(weights, grid.scales[..., None], out=out).round_()
    lowest = -grid.zero_points[..., None]
    torch.maximum(levels, lowest, out=levels)  # the two take a quarter of the time of clamp
    return torch.minimum(levels, lowest + grid.max_code, out=levels)


def rounding_difference(
    weights: torch.Tensor, grid: Grid, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``V - W`` for weights W ``[..., group_size]`` and their nearest values V on the grid."""
    levels = nearest_levels(weights, grid, out)
    return levels.mul_(grid.scales[..., None]).sub_(weights)


def to_grouped_weight(levels: torch.Tensor, grid: Grid) -> GroupedWeight:
    """Levels ``[N, G, group_size]`` and their grid ``[N, G]`` as the weight to be packed."""
    return GroupedWeight(
        codes=(levels + grid.zero_points[..., None]).to(torch.uint8).flatten(1),
        scales=grid.scales.half(),
        zero_points=grid.zero_points.to(torch.uint8),
        bits=grid.bits,
        group_size=levels.shape[-1],
    )


def clipped_weights(weight: torch.Tensor, quantized: GroupedWeight) -> torch.Tensor:
    """Which weights ``[N, K]`` lie more than half a step beyond the range of their group: bool."""
    groups = weight.unflatten(1, (-1, quantized.group_size))
    levels = groups / quantized.scales[..., None].float()
    lowest = -0.5 - quantized.zero_points[..., None].float()
    outside: torch.Tensor = (levels < lowest) | (levels > lowest + (1 << quantized.bits))
    return outside.flatten(1)


def split_rows(weight: GroupedWeight, sizes: list[int]) -> list[GroupedWeight]:
    """The weights of linear layers that were quantized as one, ``sizes`` rows each."""
    parts = zip(
        weight.codes.split(sizes),
        weight.scales.split(sizes),
        weight.zero_points.split(sizes),
        strict=True,
    )
    return [
        GroupedWeight(codes, scales, zero_points, weight.bits, weight.group_size)
        for codes, scales, zero_points in parts
    ]
