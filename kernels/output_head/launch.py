"""How the Triton search for the largest logits is launched: pure functions of the shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qserve.kernels.cost import Cost
from qserve.kernels.tiled_matmul.launch import MatmulLaunch

KEY_BYTES = 8

_LISTS_PER_WARP = 256  # 8 keys a lane


@dataclass(frozen=True, slots=True)
class HeadLaunch:
    """A launch of the product with a head that keeps the largest logits of each tile, and of the
    kernel that merges what the tiles of a row kept.

    product: how the logits are computed: as the product alone would be, all segments by one thread
        block. kept: logits that a tile keeps of a row. num_tiles: by which the vocabulary is cut.
    lists, merge_warps: of the merging kernel: one thread block a row holds the head of every list.
    """

    product: MatmulLaunch
    k: int
    kept: int
    num_tiles: int
    lists: int
    merge_warps: int


def head_launch(product: MatmulLaunch, k: int) -> HeadLaunch:
    """The launch that finds the ``k`` largest outputs of each row of ``product``."""
    num_tiles, row_tiles, _ = product.grid
    lists = 1 << (num_tiles - 1).bit_length()
    return HeadLaunch(
        product=replace(product, parallel=False, grid=(num_tiles, row_tiles, 1)),
        k=k,
        kept=min(k, product.tile.block_n),
        num_tiles=num_tiles,
        lists=lists,
        merge_warps=min(16, max(1, lists // _LISTS_PER_WARP)),
    )


def head_constants(launch: HeadLaunch) -> dict[str, Any]:
    """The compile-time arguments of the product kernel, but for the tile code of the format and
    the dtype of the logits."""
    product = launch.product
    return {
        "FORMAT": product.format,
        "BLOCK_M": product.tile.block_m,
        "BLOCK_N": product.tile.block_n,
        "SEGMENTS": product.num_segments,
    }


def head_cost(product: Cost, launch: HeadLaunch) -> Cost:
    """The work of ``launch``: that of the ``product``, whose 16-bit logits stay in registers; keys
    are written and read once."""
    problem = launch.product.problem
    logit_bytes = 2 * problem.num_rows * problem.out_features
    key_bytes = 2 * KEY_BYTES * problem.num_rows * launch.num_tiles * launch.kept
    return Cost(product.num_bytes - logit_bytes + key_bytes, product.flops)
