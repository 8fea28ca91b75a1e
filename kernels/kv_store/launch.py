"""How the Triton rotation and store is launched: pure functions of the shapes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from qserve.kernels.cost import Cost
from qserve.kernels.kv_cache import KvFormat


@dataclass(frozen=True, slots=True)
class StoreProblem:
    """The queries, keys and values of a step. rotary_dim: elements of a head that are rotated.

    itemsize: bytes of an element of the queries. interleaved: pairs are neighbours.
    """

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    format: KvFormat
    itemsize: int = 2
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class StoreLaunch:
    """A thread block for each token and ``heads`` query heads, key heads or value heads of it.

    grid: thread blocks by (tokens, tiles of heads: those of queries, of keys, of values).
    """

    problem: StoreProblem
    heads: int
    num_warps: int
    grid: tuple[int, int]


_ELEMENTS = 1024  # of a tile: 16 bytes a lane in two waves of AMD
_NUM_WARPS = 2


def store_launch(problem: StoreProblem) -> StoreLaunch:
    """The launch of ``problem``, alike on every target."""
    most = max(problem.num_heads, problem.num_kv_heads)
    columns = padded_dim(problem)
    heads = min(max(1, _ELEMENTS // columns), 1 << (most - 1).bit_length())
    num_tiles = ceil(problem.num_heads / heads) + 2 * ceil(problem.num_kv_heads / heads)
    num_warps = max(1, heads * columns * _NUM_WARPS // _ELEMENTS)
    return StoreLaunch(problem, heads, num_warps, (problem.num_tokens, num_tiles))


def store_constants(launch: StoreLaunch) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel for ``launch``."""
    problem = launch.problem
    return {
        "HEADS": launch.heads,
        "HEAD_DIM": problem.head_dim,
        "BLOCK_D": padded_dim(problem),
        "ROTARY_DIM": problem.rotary_dim,
        "BLOCK_SIZE": problem.block_size,
        "INTERLEAVED": problem.interleaved,
    }


def padded_dim(problem: StoreProblem) -> int:
    """The columns of a tile: the head dimension, padded to a power of two."""
    return 1 << (problem.head_dim - 1).bit_length()


def store_cost(problem: StoreProblem) -> Cost:
    """The work of one step: all heads read, queries and keys written back, codes written."""
    heads = 2 * problem.num_heads + 3 * problem.num_kv_heads
    row_bytes = 2 * problem.num_kv_heads * problem.format.row_bytes(problem.head_dim)
    angles = 4 * problem.rotary_dim + 8
    token_bytes = heads * problem.head_dim * problem.itemsize + row_bytes + angles
    rotated = (problem.num_heads + problem.num_kv_heads) * problem.rotary_dim
    return Cost(num_bytes=problem.num_tokens * token_bytes, flops=problem.num_tokens * 3 * rotated)
