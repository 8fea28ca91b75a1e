"""The memory layout of codebook weights that the Triton kernel reads: planar4, and a scale for each
run of inputs of one output."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.int4_matmul.planar4 import PLANE, pack_codes
from qserve.kernels.tiled_matmul.launch import BLOCK


@dataclass(frozen=True, slots=True)
class TiledCodebook:
    """A codebook weight ``[out_features, in_features]``.

    words: int16, see ``Planar4Weight``. parameters: float32 ``[num_groups, out_features]``, the
    scales. codebook: the 16 values. group_size: 32, 64 or 128.
    """

    words: torch.Tensor
    parameters: torch.Tensor
    codebook: tuple[float, ...]
    group_size: int


def suits_tiles(weight: CodebookWeight) -> bool:
    """Whether ``pack_codebook`` takes the blocks of ``weight``."""
    return _group_size(weight) >= PLANE


def pack_codebook(weight: CodebookWeight) -> TiledCodebook:
    """``weight`` as the tiles read it, on the device that holds it.

    Blocks run through the flattened weight: a group is the longest run of inputs that lies in one
    block in every row. Raises ``ValueError`` where that is less than 32.
    """
    group_size = _group_size(weight)
    if group_size < PLANE:
        raise ValueError(
            f"blocks of {weight.block_size} in rows of {weight.in_features} do not suit the tiles: "
            f"expected runs of at least {PLANE} inputs with one scale"
        )
    scales = weight.block_scales.float().repeat_interleave(weight.block_size // group_size)
    num_groups = weight.in_features // group_size
    scales = scales[: weight.out_features * num_groups].reshape(-1, num_groups)
    padding = -weight.in_features % BLOCK
    return TiledCodebook(
        words=pack_codes(weight.codes),
        parameters=torch.nn.functional.pad(scales, (0, padding // group_size)).T.contiguous(),
        codebook=tuple(weight.codebook.tolist()),
        group_size=group_size,
    )


def _group_size(weight: CodebookWeight) -> int:
    return gcd(weight.block_size, weight.in_features, BLOCK)
