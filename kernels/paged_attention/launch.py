"""How the Triton paged attention is launched: pure functions of the shapes and the target."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from qserve.kernels.cost import Cost
from qserve.kernels.gpu_target import GpuTarget, Vendor
from qserve.kernels.kv_cache import KvFormat


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """A ragged batch over a paged cache.

    num_rows: query tokens of the batch, of all sequences together.
    max_context: tokens that a row of the block table has room for.
    window: tokens that a row sees; None is all before it.
    """

    num_sequences: int
    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_context: int
    format: KvFormat = KvFormat.FLOAT16
    window: int | None = None

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
    ptx: codes are converted in inline assembly (NVIDIA).
    prefill: absent when every sequence has one row.
    """

    problem: AttentionProblem
    blocks_per_segment: int
    num_segments: int
    parallel: bool
    ptx: bool
    decode: TileLaunch
    prefill: TileLaunch | None


_MIN_ROWS = 16  # of a tensor core tile
_SMALL_SHARED_BYTES = 99 * 1024  # of consumer parts
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
    num_warps = _decode_warps(problem, target, parallel)
    grid = (problem.num_sequences, problem.num_kv_heads, num_segments if parallel else 1)
    prefill = _prefill(problem, target) if problem.num_rows > problem.num_sequences else None
    return AttentionLaunch(
        problem=problem,
        blocks_per_segment=blocks_per_segment,
        num_segments=num_segments,
        parallel=parallel,
        ptx=nvidia,
        decode=TileLaunch(decode_rows, 1, num_warps, 3 if nvidia else 2, grid),
        prefill=prefill,
    )


def tile_constants(launch: AttentionLaunch, tile: TileLaunch) -> dict[str, int | bool]:
    """The compile-time arguments of the attention kernel for one of the tiles of ``launch``."""
    decode = tile is launch.decode
    parallel = decode and launch.parallel
    return {
        "HEADS_PER_KV": launch.problem.heads_per_kv,
        "HEAD_DIM": launch.problem.head_dim,
        "BLOCK_D": padded(launch.problem.format.row_size(launch.problem.head_dim)),
        "BLOCK_SIZE": launch.problem.block_size,
        "SEGMENT_BLOCKS": launch.blocks_per_segment,
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "DECODE": decode,
        "PARALLEL": parallel,
        "MERGE": launch.num_segments > 1 and not parallel,
        "PTX": launch.ptx,
    }


def merge_constants(launch: AttentionLaunch) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel that merges segments."""
    problem = launch.problem
    return {
        "SEGMENT_TOKENS": launch.blocks_per_segment * problem.block_size,
        "HEAD_DIM": problem.head_dim,
        "BLOCK_D": padded(problem.head_dim),
        "ROTATE": problem.format.has_offsets,
    }


def padded(width: int) -> int:
    """The columns of a tile that holds ``width``: a power of two that tensor cores take."""
    return max(_MIN_ROWS, 1 << (width - 1).bit_length())


def decode_cost(problem: AttentionProblem, num_tokens: int) -> Cost:
    """The work of one decode step over ``num_tokens`` cached tokens in all sequences together.

    With a window, ``num_tokens`` are those that are seen.
    """
    rows = problem.num_sequences * problem.num_heads * problem.head_dim
    return Cost(
        num_bytes=num_tokens * token_bytes(problem) + 2 * 2 * rows,
        flops=4 * num_tokens * problem.num_heads * problem.head_dim,
    )


def prefill_cost(problem: AttentionProblem, chunk: int, prefix: int) -> Cost:
    """The work of a chunk of ``chunk`` tokens of one sequence after ``prefix`` cached tokens."""
    window = prefix + chunk if problem.window is None else problem.window
    seen = sum(min(prefix + i + 1, window) for i in range(chunk))
    rows = chunk * problem.num_heads * problem.head_dim
    return Cost(
        num_bytes=min(prefix + chunk, window + chunk - 1) * token_bytes(problem) + 2 * 2 * rows,
        flops=4 * seen * problem.num_heads * problem.head_dim,
    )


def token_bytes(problem: AttentionProblem) -> int:
    """Bytes of the keys and values of a cached token, with their scales and offsets."""
    return 2 * problem.num_kv_heads * problem.format.row_bytes(problem.head_dim)


def trip_bytes(problem: AttentionProblem) -> int:
    """Bytes of keys and values that a thread block reads in a trip of its hot loop."""
    return 2 * problem.block_size * problem.format.row_bytes(problem.head_dim)


def _decode_warps(problem: AttentionProblem, target: GpuTarget, parallel: bool) -> int:
    """Two warps spend fewer instructions on the codes of a block, where registers hold what they
    sum (of a wide head, or of the halves of a 4-bit one and the segments before, they do not) and
    shared memory holds four thread blocks."""
    if target.vendor is not Vendor.NVIDIA:
        return 4
    if target.shared_bytes <= _SMALL_SHARED_BYTES:
        return 4 if problem.head_dim <= 128 else 8
    fits = problem.head_dim <= 128 and (parallel or not problem.format.has_offsets)
    return 2 if problem.format.has_scales and fits else 4


def _prefill(problem: AttentionProblem, target: GpuTarget) -> TileLaunch:
    rows, num_warps, num_stages = 64, 8, 3
    if problem.head_dim > 128 or problem.format.has_scales:
        rows = 32  # two sums of [rows, head_dim] are held in registers, and codes beside them
        if problem.head_dim > 128 and problem.format.has_offsets:
            rows = 16
    elif problem.head_dim <= 64:
        num_warps = 4
    if problem.head_dim > 128:
        num_stages = 2
    if target.vendor is not Vendor.NVIDIA:  # what is loaded ahead waits in registers as well
        num_stages = 1 if problem.head_dim > 64 and not problem.format.has_scales else 2
        if problem.format.has_scales:
            rows = _MIN_ROWS
    rows = max(rows, 1 << (problem.heads_per_kv - 1).bit_length())
    tokens = rows // problem.heads_per_kv
    # A sequence of n tokens has ceil(n / tokens) tiles: over all, at most this many.
    num_tiles = problem.num_rows // tokens + problem.num_sequences
    grid = (num_tiles, problem.num_kv_heads, 1)
    return TileLaunch(rows, tokens, num_warps, num_stages, grid)
