"""The output head in 8 bits: one scale a row, codes to the nearest, no text needed.

A head of 16 bits is a third of what a token of a small 4-bit model reads.
"""

from __future__ import annotations

import torch

from qserve.kernels.grouped_weight import GroupedWeight, concatenate_rows
from qserve.quant.formats.writer import Coding, LayerScheme
from qserve.quant.grid import LevelSet, Rounded, Zero, grid_over_all, nearest_levels
from qserve.quant.storage import in_pieces

LEVELS = LevelSet(8, Zero.CENTERED)


def head_scheme(num_tokens: int, hidden_size: int) -> LayerScheme:
    """How a head ``[num_tokens, hidden_size]`` is coded."""
    return LayerScheme(num_tokens, hidden_size, Coding.INTEGER, LEVELS.bits, hidden_size)


def round_head(weight: torch.Tensor) -> GroupedWeight:
    """The codes of a head ``[num_tokens, hidden_size]`` of any float type."""
    return concatenate_rows([_round_rows(rows.float()) for rows in in_pieces(weight)])


def _round_rows(rows: torch.Tensor) -> GroupedWeight:
    groups = rows[:, None]
    grid = grid_over_all(groups, LEVELS)
    packed = Rounded(nearest_levels(groups, grid), grid).pack()
    assert isinstance(packed, GroupedWeight)
    return packed
