"""How the Triton norm of heads is launched: pure functions of the shapes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from qserve.kernels.cost import Cost

_ELEMENTS = 1024  # of a tile: 16 bytes a lane in two waves of AMD
_NUM_WARPS = 2


@dataclass(frozen=True, slots=True)
class HeadNormProblem:
    """Rows of ``num_heads`` heads of ``head_dim`` elements of ``itemsize`` bytes."""

    num_rows: int
    num_heads: int
    head_dim: int
    itemsize: int = 2


@dataclass(frozen=True, slots=True)
class HeadNormLaunch:
    """A thread block for each row and ``heads`` heads of it, each padded to ``block`` columns.

    grid: thread blocks by (rows, tiles of heads).
    """

    heads: int
    block: int
    num_warps: int
    grid: tuple[int, int]


def head_norm_launch(problem: HeadNormProblem) -> HeadNormLaunch:
    """The launch of ``problem``, alike on every target."""
    block = 1 << (problem.head_dim - 1).bit_length()
    heads = min(max(1, _ELEMENTS // block), 1 << (problem.num_heads - 1).bit_length())
    return HeadNormLaunch(
        heads=heads,
        block=block,
        num_warps=max(1, heads * block * _NUM_WARPS // _ELEMENTS),
        grid=(problem.num_rows, ceil(problem.num_heads / heads)),
    )


def head_norm_cost(problem: HeadNormProblem) -> Cost:
    """The work of ``problem``: one pass over the rows. The weight stays in a cache."""
    elements = problem.num_rows * problem.num_heads * problem.head_dim
    return Cost(num_bytes=2 * problem.itemsize * elements, flops=4 * elements)
