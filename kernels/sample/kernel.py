"""Sampling in Triton: a thread block draws the token of one row.

The weight of a token is kept as an integer, a multiple of 2 ** -40 of the largest. Integers add up
to the same in any order, so what is drawn follows from the row and its uniform alone. The
thresholds of top-k and top-p are found a bit at a time among the bits of float32 weights, which
order as the weights do.
"""

# Triton is untyped: its decorators, and what a kernel's arguments are.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qserve.kernels.sample.batch import GREEDY_BELOW, SamplingBatch
from qserve.kernels.sample.launch import BLOCK, NUM_WARPS

_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_NO_TOKEN = tl.constexpr(-1)
_UNIT = tl.constexpr(float(2**40))
_LOWEST_BITS = tl.constexpr(0x2A800000)  # of the float32 2 ** -42, which is less than half a unit
_ONE_BITS = tl.constexpr(0x3F800000)
_NO_ID = tl.constexpr(2**31 - 1)


def sample_tokens(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The token of each row, -1 where there is none; float32 logits are overwritten."""
    logits = logits.float()
    num_rows, vocabulary = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    changes = batch.adjustments
    sample_kernel[(num_rows,)](
        logits,
        tokens,
        batch.temperature,
        batch.top_k,
        batch.top_p,
        batch.min_p,
        batch.uniforms,
        batch.repetition_penalty,
        batch.frequency_penalty,
        batch.presence_penalty,
        None if changes is None else changes.starts,
        None if changes is None else changes.token_ids,
        None if changes is None else changes.biases,
        None if changes is None else changes.counts,
        vocabulary,
        logits.stride(0),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return tokens


@triton.jit
def sample_kernel(
    logit_ptr, token_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr,
    repetition_ptr, frequency_ptr, presence_ptr, start_ptr, id_ptr, bias_ptr, count_ptr,
    vocabulary, logit_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. What belongs to adjustments is None where there are none."""
    row = tl.program_id(0)
    logit_ptr += row.to(tl.int64) * logit_stride
    highest, best, is_good = _highest(logit_ptr, vocabulary, BLOCK)
    if start_ptr is not None:  # noqa: SIM102 - decided at compile time, the inner one is not
        if is_good:
            _adjust(
                logit_ptr, tl.load(start_ptr + row), tl.load(start_ptr + row + 1),
                id_ptr, bias_ptr, count_ptr, tl.load(repetition_ptr + row),
                tl.load(frequency_ptr + row), tl.load(presence_ptr + row),
            )  # fmt: skip
            tl.debug_barrier()  # what other threads of the block have changed is read next
            highest, best, is_good = _highest(logit_ptr, vocabulary, BLOCK)
    temperature = tl.load(temperature_ptr + row)
    token = tl.where(is_good, best, _NO_TOKEN)
    if is_good & (temperature >= _GREEDY_BELOW):
        token = _draw(
            logit_ptr, vocabulary, highest, temperature, tl.load(top_k_ptr + row),
            tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), tl.load(uniform_ptr + row), BLOCK,
        )  # fmt: skip
    tl.store(token_ptr + row, token.to(tl.int64))


@triton.jit
def _highest(logit_ptr, vocabulary, BLOCK: tl.constexpr):
    """The largest logit, the lowest id that has it, and whether it is finite and none is NaN."""
    offsets = tl.arange(0, BLOCK)
    values = tl.full((BLOCK,), float("-inf"), tl.float32)
    ids = tl.full((BLOCK,), _NO_ID, tl.int32)
    num_nans = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocabulary, BLOCK):
        at = first + offsets
        logits = tl.load(logit_ptr + at, mask=at < vocabulary, other=float("-inf"))
        num_nans += (logits != logits).to(tl.int32)
        is_higher = logits > values
        values = tl.where(is_higher, logits, values)
        ids = tl.where(is_higher, at, ids)
    highest = tl.max(values, 0)
    best = tl.min(tl.where(values == highest, ids, _NO_ID), 0)
    is_finite = (highest > float("-inf")) & (highest < float("inf"))
    return highest, best, is_finite & (tl.sum(num_nans, 0) == 0)


@triton.jit
def _adjust(
    logit_ptr, first, last, id_ptr, bias_ptr, count_ptr, repetition, frequency, presence
):  # fmt: skip
    """Biases and penalties on the tokens of entries ``first`` to ``last - 1``, each there once."""
    for start in range(first, last, 256):
        at = start + tl.arange(0, 256)
        mask = at < last
        ptrs = logit_ptr + tl.load(id_ptr + at, mask=mask, other=0)
        counts = tl.load(count_ptr + at, mask=mask, other=-1)
        values = tl.load(ptrs, mask=mask, other=0.0) + tl.load(bias_ptr + at, mask=mask, other=0.0)
        penalized = tl.where(values > 0, values / repetition, values * repetition)
        values = tl.where(counts >= 0, penalized, values)
        subtracted = frequency * counts.to(tl.float32) + presence
        values = tl.where(counts > 0, values - subtracted, values)
        tl.store(ptrs, values, mask=mask)


@triton.jit
def _draw(
    logit_ptr, vocabulary, highest, temperature, top_k, top_p, min_p, uniform, BLOCK: tl.constexpr
):  # fmt: skip
    """The token where the running sum of the weights that are kept passes ``uniform`` of it."""
    floor = tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), float("-inf"))
    row = (logit_ptr, vocabulary, tl.div_rn(highest, temperature), temperature, floor)
    lowest = _LOWEST_BITS
    if (top_k > 0) & (top_k < vocabulary):
        lowest = _search(row, lowest, top_k.to(tl.int64), True, BLOCK)
    total = _measure(row, lowest, False, BLOCK)
    num_ties = vocabulary
    if top_p < 1.0:
        wanted = tl.maximum((top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
        lowest = _search(row, lowest, wanted, False, BLOCK)
        above = _measure(row, lowest + 1, False, BLOCK)
        # Of equal weights, only the first that are needed.
        weight = tl.maximum((lowest.to(tl.float32, bitcast=True) * _UNIT).to(tl.int64), 1)
        num_ties = tl.maximum((wanted - above + weight - 1) // weight, 1).to(tl.int32)
        num_ties = tl.minimum(num_ties, _count_ties(row, lowest, BLOCK))
        total = above + num_ties * weight
    target = (uniform * total.to(tl.float64)).to(tl.int64)
    return _invert(row, lowest, num_ties, tl.minimum(target, total - 1), BLOCK)


@triton.jit
def _search(row, lowest, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The highest bits of a weight, ``lowest`` or more, such that the tokens of that weight and
    above are ``wanted`` or more (COUNT), or weigh as much; ``lowest`` where none are."""
    above = tl.full((), _ONE_BITS + 1, tl.int32)
    below = tl.zeros((), tl.int32) + lowest
    while above - below > 1:
        middle = below + (above - below) // 2
        is_enough = _measure(row, middle, COUNT, BLOCK) >= wanted
        below = tl.where(is_enough, middle, below)
        above = tl.where(is_enough, above, middle)
    return below


@triton.jit
def _weigh(row, at):
    """The weights of tokens ``at``, 1 for the most likely, and 0 for what min-p drops."""
    logit_ptr, vocabulary, highest, temperature, floor = row
    logits = tl.load(logit_ptr + at, mask=at < vocabulary, other=float("-inf"))
    scaled = tl.div_rn(logits, temperature) - highest
    return tl.where(scaled >= floor, tl.exp(scaled), 0.0)


@triton.jit
def _measure(row, lowest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens have a weight of bits ``lowest`` or more, or what they weigh together."""
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, row[1], BLOCK):
        weights = _weigh(row, first + tl.arange(0, BLOCK))
        is_kept = weights.to(tl.int32, bitcast=True) >= lowest
        units = is_kept.to(tl.int64)
        if not COUNT:
            units = tl.where(is_kept, (weights * _UNIT).to(tl.int64), 0)
        total += units
    return tl.sum(total, 0)


@triton.jit
def _count_ties(row, bits, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, row[1], BLOCK):
        weights = _weigh(row, first + tl.arange(0, BLOCK))
        total += (weights.to(tl.int32, bitcast=True) == bits).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _invert(row, lowest, num_ties, target, BLOCK: tl.constexpr):
    """The first token where the running sum of the kept weights is above ``target``.

    Of the tokens whose bits are ``lowest`` the first ``num_ties`` are kept.
    """
    token = tl.full((), _NO_ID, tl.int32)
    before = tl.zeros((), tl.int64)
    ties_before = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    while (token == _NO_ID) & (first < row[1]):
        at = first + tl.arange(0, BLOCK)
        weights = _weigh(row, at)
        bits = weights.to(tl.int32, bitcast=True)
        is_tie = bits == lowest
        ties = ties_before + tl.cumsum(is_tie.to(tl.int32), 0)
        is_kept = (bits > lowest) | (is_tie & (ties <= num_ties))
        units = tl.where(is_kept, (weights * _UNIT).to(tl.int64), 0)
        sums = before + tl.cumsum(units, 0)
        token = tl.min(tl.where(sums > target, at, _NO_ID), 0)
        before += tl.sum(units, 0)
        ties_before += tl.sum(is_tie.to(tl.int32), 0)
        first += BLOCK
    return token
