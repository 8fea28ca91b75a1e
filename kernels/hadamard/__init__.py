"""The orthonormal Hadamard transform that spreads a head's outliers over its elements."""

from __future__ import annotations

import torch


def run_length(width: int) -> int:
    """Elements that are transformed together: the largest power of two that divides ``width``."""
    return width & -width


def rotate(x: torch.Tensor) -> torch.Tensor:
    """``x [..., D]`` as float32, each run of ``run_length(D)`` elements multiplied by the Hadamard
    matrix of that size in Sylvester's order, divided by the root of the size.

    The matrix is symmetric and orthogonal: ``rotate`` is its own inverse and keeps dot products.
    """
    size = run_length(x.size(-1))
    runs = x.float().unflatten(-1, (-1, size))
    distance = 1
    while distance < size:
        pairs = runs.unflatten(-1, (-1, 2, distance))
        first, second = pairs.unbind(-2)
        runs = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        distance *= 2
    rotated: torch.Tensor = (runs * size**-0.5).flatten(-2)
    return rotated
