"""The values that the codes of a group can stand for, and rounding to the nearest of them.

A level is what a code stands for before it is scaled: ``weight = level * scale``. For integer codes
it is the code minus the zero point of its group, for a codebook the entry that the code names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from qserve.kernels.activations import MAX_FLOAT8
from qserve.kernels.codebook_weight import CODEBOOK_SIZE, CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.formats.nested_scales import NestedScales, NestedWeight, nest
from qserve.quant.formats.writer import Coding

MIN_SCALE = 2.0**-20
"""The smallest scale: 16 units of float16, so still exact to 6 %. A group of zeros has it too."""

CODEBOOK_MARGIN = 0.15
"""Half the width of the last step of nf4: a weight further out than this is clipped."""


PROTECTED = 119
"""The farthest level of a row in whole multiples of its scale, before scales are rounded."""


class Zero(Enum):
    """Where the zero of integer codes lies."""

    FREE = "free"
    """At a zero point of its own for every group."""

    MIDDLE = "middle"
    """At code ``2**(bits - 1)``. There is one code more below it than above, so the scale takes the
    sign that puts the larger side of the group there (as AutoRound's full range does)."""

    CENTERED = "centered"
    """The same with the lowest code left out, and positive scales: int8 in -127..127."""


@dataclass(frozen=True, slots=True)
class LevelSet:
    """The levels that a format can express.

    zero: of integer codes. codebook: the levels in ascending order, from -1 to 1, instead of
    integers; more than 16 are those of float8. scale_dtype: what scales are stored as. nested:
    whether they are quantized themselves (bitsandbytes' double quantization). progressive: whether
    they are whole multiples of one of the row, so that a weight is an int8 times that (QoQ).
    """

    bits: int = 4
    zero: Zero = Zero.FREE
    codebook: tuple[float, ...] | None = None
    scale_dtype: torch.dtype = torch.float16
    nested: bool = False
    progressive: bool = False

    @property
    def coding(self) -> Coding:
        """What the codes stand for."""
        if self.codebook is None:
            return Coding.INTEGER
        return Coding.CODEBOOK if len(self.codebook) == CODEBOOK_SIZE else Coding.FLOAT8

    @property
    def is_symmetric(self) -> bool:
        """Whether a group has nothing to choose but its scale."""
        return self.zero is not Zero.FREE or self.codebook is not None

    def span(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        """The grid that reaches from ``min(low, 0)`` to ``max(high, 0)`` for each group."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.codebook is not None:
            return self._grid(torch.maximum(-low, high), torch.zeros_like(low))
        top = 1 << self.bits
        if self.zero is Zero.FREE:
            grid = self._grid((high - low) / (top - 1), low)
            zero_points = (-low / grid.scales).round_().clamp_(0, top - 1)
            return Grid(grid.scales, zero_points, self)
        half = torch.full_like(low, top // 2)
        if self.zero is Zero.CENTERED:
            return self._grid(torch.maximum(-low, high) / (top // 2 - 1), half)
        larger, smaller = torch.maximum(-low, high), torch.minimum(-low, high)
        grid = self._grid(torch.maximum(larger / (top // 2), smaller / (top // 2 - 1)), half)
        return Grid(torch.where(high > -low, -grid.scales, grid.scales), half, self)

    def _grid(self, scales: torch.Tensor, zero_points: torch.Tensor) -> Grid:
        return Grid(self.stored(scales.clamp(min=MIN_SCALE)), zero_points, self)

    def stored(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales as a reader of the checkpoint will see them, in float32."""
        return scales.to(self.scale_dtype).float()


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of groups of weights, of any matching shape ``[...]``.

    Both are float32 for arithmetic, but the scales hold values of their stored type (so that codes
    are chosen for the scale that a reader will see) and the zero points whole numbers of
    ``[0, 2**bits)``: zero is always on the grid. A codebook has no zero points: they are 0.
    nested: how scales that are quantized themselves are stored, once they are settled. outer: the
    scales ``[N]`` of rows that those of groups are multiples of, once they are settled.
    """

    scales: torch.Tensor
    zero_points: torch.Tensor
    levels: LevelSet
    nested: NestedScales | None = None
    outer: torch.Tensor | None = None

    def settled(self) -> Grid:
        """The grid ``[N, G]`` of a whole layer with its scales as they are stored."""
        if self.levels.progressive:
            return self._settled_in_rows()
        if not self.levels.nested:
            return self
        nested = nest(self.scales.flatten())
        scales = nested.dequantize().view_as(self.scales)
        return Grid(scales, self.zero_points, self.levels, nested)

    def reach(self) -> torch.Tensor:
        """The magnitude of the farthest value of each group; integer levels only."""
        top = (1 << self.levels.bits) - 1
        return self.scales * torch.maximum(self.zero_points, top - self.zero_points)

    def _settled_in_rows(self) -> Grid:
        """Scales as whole multiples of one for each row.

        The farthest level of the widest group becomes 119 of them: a scale that is rounded up moves
        it by half of the 15 levels at most, so that it stays in -127..127 (QoQ's protective range,
        Lin et al. 2024, arXiv 2405.04532, section 4.1).
        """
        outer = self.reach().amax(1) / PROTECTED
        whole = (self.scales / outer[:, None]).round_().clamp_(min=1)
        return Grid(whole * outer[:, None], self.zero_points, self.levels, outer=outer)

    def snap_(self, units: torch.Tensor) -> torch.Tensor:
        """Replace ``units [..., group_size]``, weights over their scales, by the nearest levels."""
        return snapper(self.levels, self.zero_points[..., None])(units)


ChooseGrid = Callable[[torch.Tensor, LevelSet], Grid]
"""The grid ``[...]`` for weights in groups, ``[..., group_size]``."""


def snapper(levels: LevelSet, zero_points: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that replaces weights over their scales by the nearest levels, in place.

    ``zero_points`` broadcasts to what it is called with. Half way between two levels a codebook
    takes the lower (as bitsandbytes does), integers the even one.
    """
    if levels.codebook is not None:
        table = torch.tensor(levels.codebook)
        middles = (table[1:] + table[:-1]) / 2
        return lambda units: units.copy_(table[torch.bucketize(units.contiguous(), middles)])
    lowest = -zero_points
    highest = lowest + ((1 << levels.bits) - 1)
    if levels.zero is Zero.CENTERED:
        lowest = lowest + 1

    def snap_to_integers_(units: torch.Tensor) -> torch.Tensor:
        units.round_()
        torch.maximum(units, lowest, out=units)  # the two take a quarter of the time of clamp
        return torch.minimum(units, highest, out=units)

    return snap_to_integers_


def grid_over_all(weights: torch.Tensor, levels: LevelSet) -> Grid:
    """The grid from the least to the greatest weight of each group ``[..., group_size]``."""
    return levels.span(weights.amin(-1), weights.amax(-1))  # aminmax takes 8 times as long


def nearest_levels(
    weights: torch.Tensor, grid: Grid, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The nearest levels of ``weights [..., group_size]``, in float32."""
    return grid.snap_(torch.div(weights, grid.scales[..., None], out=out))


def rounding_difference(
    weights: torch.Tensor, grid: Grid, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``V - W`` for weights W ``[..., group_size]`` and their nearest values V on the grid."""
    levels = nearest_levels(weights, grid, out)
    return levels.mul_(grid.scales[..., None]).sub_(weights)


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight ``[N, K]`` as levels ``[N, G, group_size]`` of a grid ``[N, G]``.

    input_order: ``[K]``, the inputs in the order in which they fill the groups; None as they are.
    """

    levels: torch.Tensor
    grid: Grid
    input_order: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """What the levels stand for: float32 ``[N, K]``."""
        return self._natural((self.levels * self.grid.scales[..., None]).flatten(1))

    def _natural(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns ``[N, K]`` in the order of the inputs."""
        if self.input_order is None:
            return columns
        natural = torch.empty_like(columns)
        natural[:, self.input_order] = columns
        return natural

    def clipped(self, weight: torch.Tensor) -> torch.Tensor:
        """Which weights ``[N, K]`` lie more than half a step beyond their group's range: bool."""
        in_groups = weight if self.input_order is None else weight[:, self.input_order]
        units = in_groups.view_as(self.levels) / self.grid.scales[..., None]
        if self.grid.levels.codebook is not None:
            return self._natural((units.abs() > 1 + CODEBOOK_MARGIN).flatten(1))
        lowest = -0.5 - self.grid.zero_points[..., None]
        outside = (units < lowest) | (units > lowest + (1 << self.grid.levels.bits))
        return self._natural(outside.flatten(1))

    def split(self, sizes: list[int]) -> list[Rounded]:
        """The linear layers that were rounded as one, ``sizes`` rows each; scales not nested."""
        grid = self.grid
        outer = [None] * len(sizes) if grid.outer is None else grid.outer.split(sizes)
        return [
            Rounded(levels, Grid(scales, zeros, grid.levels, outer=own), self.input_order)
            for levels, scales, zeros, own in zip(
                self.levels.split(sizes),
                grid.scales.split(sizes),
                grid.zero_points.split(sizes),
                outer,
                strict=True,
            )
        ]

    def pack(self) -> QuantizedWeight:
        """The codes, in the neutral form that every format is written from."""
        grid, kind = self.grid, self.grid.levels
        if kind.coding is Coding.INTEGER:
            scales = grid.scales
            if grid.outer is not None:
                scales = (scales / grid.outer[:, None]).round()
            return GroupedWeight(
                codes=(self.levels + grid.zero_points[..., None]).to(torch.uint8).flatten(1),
                scales=scales.to(kind.scale_dtype),
                zero_points=grid.zero_points.to(torch.uint8),
                bits=kind.bits,
                group_size=self.levels.shape[-1],
                input_order=self.input_order,
                channel_scales=grid.outer,
            )
        if kind.coding is Coding.FLOAT8:
            values = (self.levels * MAX_FLOAT8).to(torch.float8_e4m3fn).flatten(1)
            return Float8Weight(values, grid.scales / MAX_FLOAT8, (1, self.levels.shape[-1]))
        table = torch.tensor(kind.codebook)
        middles = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(self.levels.contiguous(), middles).to(torch.uint8).flatten(1)
        form = (codes, table, grid.scales.flatten(), self.levels.shape[-1])
        return CodebookWeight(*form) if grid.nested is None else NestedWeight(*form, grid.nested)
