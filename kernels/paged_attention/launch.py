"""How the Triton paged attention is launched: pure functions of the shapes and the target."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget, Vendor


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """A ragged batch over a cache of 16-bit keys and values.

    num_rows: query tokens of the batch, of all sequences together.
    max_context: tokens that a row of the block table has room for.
    """

    num_sequences: int
    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_context: int

    @property
    def heads_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class TileLaunch:
    """A launch of the attention kernel for one kind of sequence, decoding or prefilling.

    rows: rows of a tile, each a query token with one of the heads that share a KV head.
    tokens: query tokens of a tile: ``rows // heads_per_kv`` for prefill, 1 for decode.
    grid: thread blocks by (tiles, KV heads, segments).
    """

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class AttentionLaunch:
    """The launches that ``problem`` needs.

    blocks_per_segment: cache blocks whose softmax is taken apart; segments are then merged in
        order. It does not depend on the batch, so neither does the result of a row.
    num_segments: segments of the longest sequence that the block table has room for.
    parallel: decode gives each segment a thread block and merges in a second kernel; otherwise one
        thread block walks the segments and merges in registers, in the same order.
    prefill: absent when every sequence has one row.
    """

    problem: AttentionProblem
    blocks_per_segment: int
    num_segments: int
    parallel: bool
    decode: TileLaunch
    prefill: TileLaunch | None


_MIN_ROWS = 16  # of a tensor core tile
_SEGMENT_TOKENS = 256  # eight KV heads fill an A100 from one sequence of 3,500 tokens on
_MAX_SEGMENTS = 64  # 16 Ki tokens; longer tables get longer segments, to bound the workspace


def attention_launch(problem: AttentionProblem, target: GpuTarget) -> AttentionLaunch:
    """The launch of ``problem`` on ``target``.

    Raises ``ValueError`` for a block size that tensor cores cannot take.
    """
    block_size = problem.block_size
    if block_size < _MIN_ROWS or block_size & (block_size - 1):
        raise ValueError(
            f"blocks of {block_size} tokens cannot be read by tensor cores: "
            "use a power of two of at least 16, best 64"
        )
    num_blocks = ceil(problem.max_context / block_size)
    blocks_per_segment = max(1, _SEGMENT_TOKENS // block_size)
    while num_blocks > _MAX_SEGMENTS * blocks_per_segment:
        blocks_per_segment *= 2
    num_segments = max(1, ceil(num_blocks / blocks_per_segment))
    num_tiles = problem.num_sequences * problem.num_kv_heads
    parallel = num_segments > 1 and num_tiles < 4 * target.num_cores
    decode_rows = max(_MIN_ROWS, 1 << (problem.heads_per_kv - 1).bit_length())
    nvidia = target.vendor is Vendor.NVIDIA
    grid = (problem.num_sequences, problem.num_kv_heads, num_segments if parallel else 1)
    prefill = _prefill(problem, target) if problem.num_rows > problem.num_sequences else None
    return AttentionLaunch(
        problem=problem,
        blocks_per_segment=blocks_per_segment,
        num_segments=num_segments,
        parallel=parallel,
        decode=TileLaunch(decode_rows, 1, 4, 3 if nvidia else 2, grid),
        prefill=prefill,
    )


def tile_constants(launch: AttentionLaunch, tile: TileLaunch) -> dict[str, int | bool]:
    """The compile-time arguments of the attention kernel for one of the tiles of ``launch``."""
    decode = tile is launch.decode
    parallel = decode and launch.parallel
    return {
        "HEADS_PER_KV": launch.problem.heads_per_kv,
        "HEAD_DIM": launch.problem.head_dim,
        "BLOCK_D": padded_head_dim(launch.problem),
        "BLOCK_SIZE": launch.problem.block_size,
        "SEGMENT_BLOCKS": launch.blocks_per_segment,
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "DECODE": decode,
        "PARALLEL": parallel,
        "MERGE": launch.num_segments > 1 and not parallel,
    }


def padded_head_dim(problem: AttentionProblem) -> int:
    """The head dimension of a tile: a power of two."""
    return max(_MIN_ROWS, 1 << (problem.head_dim - 1).bit_length())


def decode_cost(problem: AttentionProblem, num_tokens: int) -> Cost:
    """The work of one decode step over ``num_tokens`` cached tokens in all sequences together."""
    width = problem.num_kv_heads * problem.head_dim
    rows = problem.num_sequences * problem.num_heads * problem.head_dim
    return Cost(
        num_bytes=2 * 2 * num_tokens * width + 2 * 2 * rows,
        flops=4 * num_tokens * problem.num_heads * problem.head_dim,
    )


def prefill_cost(problem: AttentionProblem, chunk: int, prefix: int) -> Cost:
    """The work of a chunk of ``chunk`` tokens of one sequence after ``prefix`` cached tokens."""
    width = problem.num_kv_heads * problem.head_dim
    rows = chunk * problem.num_heads * problem.head_dim
    return Cost(
        num_bytes=2 * 2 * (prefix + chunk) * width + 2 * 2 * rows,
        flops=4
        * (prefix * chunk + chunk * (chunk + 1) // 2)
        * problem.num_heads
        * problem.head_dim,
    )


def trip_bytes(problem: AttentionProblem) -> int:
    """Bytes of keys and values that a thread block reads in a trip of its hot loop."""
    return 2 * 2 * problem.block_size * problem.head_dim


def _prefill(problem: AttentionProblem, target: GpuTarget) -> TileLaunch:
    rows, num_warps, num_stages = 64, 8, 3
    if problem.head_dim > 128:
        rows, num_stages = 32, 2  # two sums of [rows, head_dim] are held in registers
    elif problem.head_dim <= 64:
        num_warps = 4
    rows = max(rows, 1 << (problem.heads_per_kv - 1).bit_length())
    tokens = rows // problem.heads_per_kv
    # A sequence of n tokens has ceil(n / tokens) tiles: over all, at most this many.
    num_tiles = problem.num_rows // tokens + problem.num_sequences
    if target.vendor is not Vendor.NVIDIA:
        num_stages = 2
    grid = (num_tiles, problem.num_kv_heads, 1)
    return TileLaunch(rows, tokens, num_warps, num_stages, grid)
