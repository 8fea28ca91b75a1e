"""The largest logits of an output head in Triton: each tile of the product keeps its own, and they
are merged for each row.

A logit and its id are one integer, which orders as they do: the larger logit first, of equals the
lower id, NaN before everything.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.activations import Activations
from qserve.kernels.output_head.launch import HeadLaunch, head_constants, head_launch
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.tiled_matmul.kernel import TiledProduct, apply_epilogue

LOGIT_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""What a product would round its outputs to."""

_NOTHING = tl.constexpr(-(2**63))  # below the key of every logit
_ABOVE_ALL = tl.constexpr(2**63 - 1)
_LOW_BITS = tl.constexpr(2**31 - 1)


def topk_head(
    x: torch.Tensor, weight: PackedWeight, k: int, activations: Activations
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values ``[M, k]`` of the largest outputs of each row, largest first; of a weight that
    lies in tiles."""
    assert weight.arrange is not None
    product: TiledProduct = weight.arrange(x, activations)
    return find_largest(product, head_launch(product.launch, k), x.dtype)


def find_largest(
    product: TiledProduct, launch: HeadLaunch, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``topk_head``. dtype: that logits are rounded to."""
    weight, problem = product.weight, launch.product.problem
    num_rows, device = problem.num_rows, product.rows.device
    ids = torch.empty(num_rows, launch.k, dtype=torch.int64, device=device)
    values = torch.empty(num_rows, launch.k, device=device)
    if not num_rows:
        return ids, values
    keys = torch.empty(num_rows, launch.num_tiles, launch.kept, dtype=torch.int64, device=device)
    head_kernel[launch.product.grid](
        product.rows,
        weight.codes,
        weight.parameters,
        keys,
        product.row_scales,
        weight.channel_scales,
        weight.bias,
        num_rows,
        problem.out_features,
        problem.in_features,
        weight.codes.stride(0),
        product.rows.stride(0),
        launch.product.blocks_per_segment,
        launch.kept,
        SUM=product.sum_blocks,
        LOGIT=LOGIT_DTYPES[dtype],
        **head_constants(launch),
        num_warps=launch.product.tile.num_warps,
        num_stages=launch.product.tile.num_stages,
        enable_fp_fusion=True,
    )
    merge_kernel[(num_rows,)](
        keys,
        ids,
        values,
        launch.num_tiles,
        launch.kept,
        launch.k,
        LISTS=launch.lists,
        num_warps=launch.merge_warps,
    )
    return ids, values


@triton.jit
def head_kernel(
    x_ptr, code_ptr, parameter_ptr, key_ptr, row_scale_ptr, channel_ptr, bias_ptr,
    num_rows, num_outputs, num_inputs, code_stride, x_stride, blocks_per_segment, num_kept,
    SUM: tl.constexpr, FORMAT: tl.constexpr, LOGIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The keys of the ``num_kept`` largest outputs of a tile for each of its rows, largest first.

    key_ptr: ``[num_rows, tiles of outputs, num_kept]``. Sums are made as in ``matmul_kernel``.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    near_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    near_outputs = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    x_ptrs = x_ptr + near_rows[:, None] * x_stride
    code_ptrs = code_ptr + near_outputs[:, None] * code_stride
    num_blocks = tl.cdiv(num_inputs, 128)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for segment in range(SEGMENTS):
        first = segment * blocks_per_segment
        total += SUM(
            x_ptrs, code_ptrs, parameter_ptr, near_outputs, num_inputs, num_outputs, first,
            tl.minimum(first + blocks_per_segment, num_blocks), FORMAT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    total = apply_epilogue(
        total, row_scale_ptr, near_rows[None, :], channel_ptr, bias_ptr, near_outputs[:, None]
    )
    keys = _make_keys(total.to(LOGIT).to(tl.float32), outputs[:, None])
    keys = tl.where((outputs < num_outputs)[:, None], keys, _NOTHING)
    list_ptrs = key_ptr + (near_rows * tl.num_programs(0) + tl.program_id(0)) * num_kept
    largest = tl.full((BLOCK_M,), _ABOVE_ALL, tl.int64)
    for place in range(num_kept):
        largest = tl.max(tl.where(keys < largest[None, :], keys, _NOTHING), 0)
        tl.store(list_ptrs + place, largest, mask=rows < num_rows)


@triton.jit
def merge_kernel(
    key_ptr, id_ptr, value_ptr, num_lists, num_kept, k, LISTS: tl.constexpr
):  # fmt: skip
    """The ids and values of the ``k`` largest keys of a row's lists, each of which is sorted."""
    row = tl.program_id(0).to(tl.int64)
    lists = tl.arange(0, LISTS)
    ptrs = key_ptr + (row * num_lists + lists) * num_kept
    heads = tl.load(ptrs, mask=lists < num_lists, other=_NOTHING)
    num_taken = tl.zeros((LISTS,), tl.int32)
    for place in range(k):
        largest = tl.max(heads, 0)
        _store_key(largest, id_ptr + row * k + place, value_ptr + row * k + place)
        is_taken = heads == largest  # in one list: a key has an id in it
        num_taken += is_taken.to(tl.int32)
        is_left = is_taken & (num_taken < num_kept)
        following = tl.load(ptrs + num_taken, mask=is_left, other=_NOTHING)
        heads = tl.where(is_taken, following, heads)


@triton.jit
def _make_keys(logits, ids):
    """int64: the bits of float32 ``logits``, made to order as the numbers do, above the ids."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # -0 equals 0
    ordered = tl.where(bits < 0, bits ^ _LOW_BITS, bits)
    ordered = tl.where(logits != logits, _LOW_BITS, ordered)
    return (ordered.to(tl.int64) << 32) | (ids ^ _LOW_BITS).to(tl.int64)


@triton.jit
def _store_key(key, id_ptr, value_ptr):
    """The id and the logit of which ``_make_keys`` made ``key``."""
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ _LOW_BITS, ordered)
    tl.store(id_ptr, (key & _LOW_BITS) ^ _LOW_BITS)
    tl.store(value_ptr, bits.to(tl.float32, bitcast=True))
