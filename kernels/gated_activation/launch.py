"""How the Triton gated activation is launched: pure functions of the shapes."""

from __future__ import annotations

from math import ceil

from qserve.kernels.cost import Cost

BLOCK = 1024
"""Columns of a tile: 16 bytes a lane in two waves of AMD, twice that in two warps of NVIDIA."""

NUM_WARPS = 2


def gate_grid(num_rows: int, width: int) -> tuple[int, int]:
    """Thread blocks by (rows, tiles of the ``width`` columns of the result)."""
    return num_rows, ceil(width / BLOCK)


def gate_cost(num_rows: int, width: int, itemsize: int = 2) -> Cost:
    """The work on rows of ``width`` results, each from a gate and a factor."""
    elements = num_rows * width
    return Cost(num_bytes=3 * itemsize * elements, flops=5 * elements)
