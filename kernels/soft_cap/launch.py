"""How the Triton soft cap is launched: pure functions of the shapes."""

from __future__ import annotations

from math import ceil

from qserve.kernels.cost import Cost

BLOCK = 1024
"""Columns of a tile: 16 bytes a lane in two waves of AMD, twice that in two warps of NVIDIA."""

NUM_WARPS = 2


def cap_grid(num_rows: int, width: int) -> tuple[int, int]:
    """Thread blocks by (rows, tiles of the ``width`` columns)."""
    return num_rows, ceil(width / BLOCK)


def cap_cost(num_rows: int, width: int, itemsize: int = 2) -> Cost:
    """The work on rows of ``width`` numbers."""
    elements = num_rows * width
    return Cost(num_bytes=2 * itemsize * elements, flops=5 * elements)
