"""Codes of widths that no kernel has, as codes of the next width that one has."""

from __future__ import annotations

import torch

WIDTHS = {1: 2, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Stored bits -> bits of the weight in memory."""


def widen(codes: torch.Tensor, zero_points: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Codes and zero points (uint8) of ``bits`` bits in the width of ``WIDTHS[bits]``.

    Both move by the same amount, so that the weight stays and a symmetric one stays symmetric.
    """
    shift = (1 << (WIDTHS[bits] - 1)) - (1 << (bits - 1))
    return (codes + shift, zero_points + shift) if shift else (codes, zero_points)
