"""Rotary positions, quantization and the store into the cache in Triton, in one pass.

A tile is some heads of one token: all query heads, key heads or value heads. Queries and keys are
rotated and written back; keys and values are then turned into codes as ``kv_codes.encode`` defines.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.hadamard.kernel import rotate_tile
from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.kv_codes import SMALLEST_SCALE
from qserve.kernels.kv_store.launch import StoreLaunch, StoreProblem, store_constants, store_launch

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
# Adding it to a number below 2 ** 22 leaves the nearest integer, ties to even, in the low bits.
_ROUND = tl.constexpr(12582912.0)


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: LayerCache,
    slot_mapping: torch.Tensor,
    interleaved: bool,
) -> None:
    """Rotates q and k inside ``qkv`` and writes k and v to the slots; see the public op."""
    problem = StoreProblem(
        num_tokens=qkv.shape[0],
        num_heads=qkv.shape[1] // kv.head_dim - 2 * kv.num_kv_heads,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        rotary_dim=cos_sin.shape[1],
        block_size=kv.block_size,
        format=kv.format,
        itemsize=qkv.itemsize,
        interleaved=interleaved,
    )
    if problem.num_tokens:
        run(qkv, (positions, slot_mapping, cos_sin), kv, store_launch(problem))


def run(
    qkv: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kv: LayerCache,
    launch: StoreLaunch,
) -> None:
    """Runs one chosen launch. places: positions, slots and the table of angles."""
    problem = launch.problem
    k, v = kv.k, kv.v
    if kv.format is KvFormat.FLOAT8:
        k, v = k.view(torch.uint8), v.view(torch.uint8)  # for targets that do not know the type
    store_kernel[launch.grid](
        qkv,
        *places,
        k,
        v,
        kv.k_scales,
        kv.v_scales,
        kv.k_offsets,
        kv.v_offsets,
        qkv.stride(0),
        problem.num_heads,
        problem.num_kv_heads,
        **store_constants(launch),
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )


@triton.jit
def store_kernel(
    qkv_ptr, position_ptr, slot_ptr, cos_sin_ptr,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_offset_ptr, v_offset_ptr,
    qkv_stride, num_heads, num_kv_heads,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, all of one kind. Scales and offsets may be None."""
    token = tl.program_id(0)
    tile = tl.program_id(1)
    query_tiles = tl.cdiv(num_heads, HEADS)
    key_tiles = tl.cdiv(num_kv_heads, HEADS)
    is_query = tile < query_tiles
    is_value = tile >= query_tiles + key_tiles
    before = tl.where(is_query, 0, tl.where(is_value, query_tiles + key_tiles, query_tiles))
    heads = (tile - before) * HEADS + tl.arange(0, HEADS)
    has_head = heads < tl.where(is_query, num_heads, num_kv_heads)
    first_head = tl.where(is_query, 0, tl.where(is_value, num_heads + num_kv_heads, num_heads))
    dims = tl.arange(0, BLOCK_D)
    mask = has_head[:, None] & (dims < HEAD_DIM)[None, :]
    x_ptrs = qkv_ptr + token.to(tl.int64) * qkv_stride
    x_ptrs += (first_head + heads)[:, None] * HEAD_DIM + dims[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    if not is_value:
        angles = cos_sin_ptr + tl.load(position_ptr + token).to(tl.int64) * ROTARY_DIM
        x = _turn(x.to(tl.float32), angles, BLOCK_D, ROTARY_DIM, INTERLEAVED).to(x.dtype)
        tl.store(x_ptrs, x, mask=mask)
    slot = tl.load(slot_ptr + token)
    if is_query | (slot < 0):
        return
    page = (slot // BLOCK_SIZE).to(tl.int64) * num_kv_heads + heads
    slots = page * BLOCK_SIZE + slot % BLOCK_SIZE
    x = x.to(tl.float32)
    if is_value:
        _store(x, v_ptr, v_scale_ptr, v_offset_ptr, slots, has_head, HEAD_DIM, BLOCK_D)
    else:
        _store(x, k_ptr, k_scale_ptr, k_offset_ptr, slots, has_head, HEAD_DIM, BLOCK_D)


@triton.jit
def _turn(
    x, angle_ptr, BLOCK_D: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """``x`` with its pairs of elements turned by the angles of a position."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    dims = tl.arange(0, BLOCK_D)
    is_turned = dims < ROTARY_DIM
    if INTERLEAVED:
        pairs = dims // 2
        is_second = dims % 2 == 1
        partners = dims ^ 1
    else:
        is_second = dims >= HALF
        pairs = tl.where(is_second, dims - HALF, dims)
        partners = tl.where(is_second, dims - HALF, dims + HALF)
    partners = tl.where(is_turned, partners, dims)
    cos = tl.load(angle_ptr + pairs, mask=is_turned, other=1.0)
    sin = tl.load(angle_ptr + HALF + pairs, mask=is_turned, other=0.0)
    sin = tl.where(is_second, sin, -sin)
    others = tl.gather(x, tl.broadcast_to(partners[None, :], x.shape), 1)
    return x * cos[None, :] + others * sin[None, :]


@triton.jit
def _store(
    x, code_ptr, scale_ptr, offset_ptr, slots, has_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the codes of heads ``x`` to their slots, and their scales and offsets."""
    dtype: tl.constexpr = code_ptr.dtype.element_ty
    WIDTH: tl.constexpr = HEAD_DIM // 2 if offset_ptr is not None else HEAD_DIM
    dims = tl.arange(0, BLOCK_D)
    if scale_ptr is None:
        codes = x
    else:
        # NaN where an element is NaN or infinite: the maximum would pass over the former.
        poison = tl.sum(x * 0.0, 1)
        if offset_ptr is not None:
            x = rotate_tile(x, HEAD_DIM & -HEAD_DIM)
            is_in = (dims < HEAD_DIM)[None, :]
            low = tl.min(tl.where(is_in, x, float("inf")), 1)
            high = tl.max(tl.where(is_in, x, float("-inf")), 1)
            scale = _round_scale(high - low, 15.0, poison)
            offset = low.to(tl.float16)
            x = x - offset.to(tl.float32)[:, None]
            scaled = tl.div_rn(x, tl.broadcast_to(scale.to(tl.float32)[:, None], x.shape))
            codes = _round(tl.minimum(tl.maximum(scaled, 0.0), 15.0)).to(tl.int32)
            others = tl.minimum(dims + WIDTH, BLOCK_D - 1)
            codes |= tl.gather(codes, tl.broadcast_to(others[None, :], codes.shape), 1) << 4
            tl.store(offset_ptr + slots, offset, mask=has_head)
        else:
            LARGEST: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
            scale = _round_scale(tl.max(tl.abs(x), 1), LARGEST, poison)
            scaled = tl.div_rn(x, tl.broadcast_to(scale.to(tl.float32)[:, None], x.shape))
            scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
            codes = _round(scaled).to(tl.int32) if dtype == tl.int8 else _float8_bits(scaled)
        tl.store(scale_ptr + slots, scale, mask=has_head)
    mask = has_head[:, None] & (dims < WIDTH)[None, :]
    tl.store(code_ptr + slots[:, None] * WIDTH + dims[None, :], codes.to(dtype), mask=mask)


@triton.jit
def _round_scale(span, LARGEST: tl.constexpr, poison):
    """The scale that is stored: float16, never 0."""
    scale = tl.div_rn(span, tl.full(span.shape, LARGEST, tl.float32))
    return (tl.maximum(scale, _SMALLEST_SCALE) + poison).to(tl.float16)


@triton.jit
def _round(x):
    return (x + _ROUND) - _ROUND


@triton.jit
def _float8_bits(x):
    """The bits of the e4m3 numbers nearest to ``x``, ties to even; ``abs(x) <= 448``.

    By integer arithmetic: half of the targets have no conversion. A number below 2 ** -6 has no
    exponent of its own, it is a multiple of 2 ** -9.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits &= 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(x) * 512.0 + _ROUND).to(tl.int32, bitcast=True) & 0xF
    return sign | tl.where(bits < 0x3C800000, small, normal)
