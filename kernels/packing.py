"""Codes in 32-bit words: the only module that knows bit order.

A packed axis is a dense little-endian bitstream: code ``i`` occupies stream bits
``bits*i .. bits*i + bits - 1``, so for 2, 4 and 8 bits word ``w`` holds codes ``w * 32 / bits ...``
from its least significant field up (AutoGPTQ, compressed-tensors), and 3-bit codes may straddle
two words.
"""

from __future__ import annotations

import math

import torch

WORD_BITS = 32

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Field ``i`` of an AutoAWQ "gemm" word holds logical element ``AWQ_ORDER[i]``."""


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words that hold ``codes`` along the last axis.

    codes: integer ``[..., n]`` with values in ``[0, 2**bits)``; ``n * bits`` a multiple of 32.
    Returns int32 ``[..., n * bits / 32]``. Raises ``ValueError`` for a count that does not fill
    whole words or for a code out of range (an unchecked code would spill into its neighbour).
    """
    count = codes.shape[-1]
    if count * bits % WORD_BITS:
        raise ValueError(
            f"{count} codes of {bits} bits do not fill whole 32-bit words: pad the axis"
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(
            f"codes span [{int(codes.min())}, {int(codes.max())}], "
            f"expected [0, {(1 << bits) - 1}]: clamp before packing"
        )
    period = math.lcm(bits, WORD_BITS)  # bits after which codes and words line up again
    fields = _split_last(codes, period // bits)
    words = torch.zeros(*fields.shape[:-1], period // WORD_BITS, dtype=torch.int64)
    for i in range(period // bits):
        word, shift = divmod(i * bits, WORD_BITS)
        shifted = fields[..., i].to(torch.int64) << shift
        words[..., word] |= shifted & 0xFFFFFFFF
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= shifted >> WORD_BITS
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).flatten(-2)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes held by ``words`` along the last axis: uint8 ``[..., count]``.

    words: int32 ``[..., ceil(count * bits / 32)]``. Raises ``ValueError`` when they are too few.
    """
    held = words.shape[-1] * WORD_BITS // bits
    if held < count:
        raise ValueError(
            f"{words.shape[-1]} words hold {held} codes of {bits} bits, {count} needed"
        )
    period = math.lcm(bits, WORD_BITS)
    num_words = period // WORD_BITS
    if short := -words.shape[-1] % num_words:
        words = torch.nn.functional.pad(words, (0, short))
    mask = (1 << bits) - 1
    straddling = WORD_BITS % bits != 0
    groups = _split_last(words.to(torch.int64) & 0xFFFFFFFF if straddling else words, num_words)
    codes = torch.empty(*groups.shape[:-1], period // bits, dtype=torch.uint8)
    for i in range(period // bits):
        word, shift = divmod(i * bits, WORD_BITS)
        field = groups[..., word] >> shift
        if shift + bits > WORD_BITS:
            field = field | groups[..., word + 1] << (WORD_BITS - shift)
        # Masked after the shift, so that the sign bit an arithmetic shift drags along is gone.
        codes[..., i] = (field & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :count]


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """AutoAWQ "gemm" words: 4-bit codes ``[..., n]`` to int32 ``[..., n / 8]`` in ``AWQ_ORDER``."""
    if codes.shape[-1] % 8:
        raise ValueError(f"{codes.shape[-1]} codes do not fill whole words of 8: pad the axis")
    order = torch.tensor(AWQ_ORDER)
    return pack_words(_split_last(codes, 8)[..., order].flatten(-2), 4)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """The codes of AutoAWQ "gemm" words: int32 ``[..., w]`` to uint8 ``[..., 8 * w]``, in order.

    Of a matrix ``[k, w]``, the transpose of the result is contiguous: that is what a reader wants,
    and unpacking the transpose is several times as fast, since every copy then runs along memory.
    """
    columns = words.reshape(-1, words.shape[-1]).T.contiguous()
    codes = torch.empty(columns.shape[0], 8, columns.shape[1], dtype=torch.uint8)
    for field, element in enumerate(AWQ_ORDER):
        codes[:, element] = columns >> (4 * field) & 15
    return codes.flatten(0, 1).T.reshape(*words.shape[:-1], words.shape[-1] * 8)


def _split_last(values: torch.Tensor, size: int) -> torch.Tensor:
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)
