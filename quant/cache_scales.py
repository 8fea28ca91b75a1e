"""Scales for 8-bit keys and values, one a head, found on what a model computes from text.

Keys are taken where a cache takes them: after the rotation. Every scale is the one of a few that
loses least: the largest magnitude on the top code, or less of it with the rest clipped.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from qserve.kernels.activations import MAX_FLOAT8
from qserve.quant.decoder import Decoder
from qserve.quant.formats.compressed_schemes import Kind
from qserve.quant.progress import Phase, Progress, ProgressCallback
from qserve.quant.windows import Windows

MAX_INT8 = 127
NUM_CANDIDATES = 16
SMALLEST_SHARE = 0.4
MIN_SCALE = 2.0**-20
KEYS, VALUES = "self_attn.k_scale", "self_attn.v_scale"


def blank_scales(num_blocks: int, num_heads: int) -> dict[str, torch.Tensor]:
    """Scales of 1 under the names they are stored by: float32 ``[num_heads, 1, 1]``."""
    return {
        f"model.layers.{index}.{name}": torch.ones(num_heads, 1, 1)
        for index in range(num_blocks)
        for name in (KEYS, VALUES)
    }


def find_scales(
    decoder: Decoder, windows: Windows, kind: Kind, progress: ProgressCallback
) -> dict[str, torch.Tensor]:
    """The scales of every block, for what counts in the windows; as ``blank_scales`` has them."""
    hidden = decoder.embed(windows.token_ids)
    started = time.perf_counter()
    total = decoder.num_blocks
    scales = {}
    for index in range(total):
        block = decoder.block(index, windows.token_ids.shape[1])
        seen = _Seen()
        block.store_into(seen)
        block.run_(hidden)
        for name, rows in ((KEYS, seen.keys), (VALUES, seen.values)):
            counted = torch.cat(
                [some[:, here].flatten(1) for some, here in zip(rows, windows.counts, strict=True)],
                1,
            )
            scales[block.full_name(name)] = least_loss(counted, kind)[:, None, None]
        left = (time.perf_counter() - started) / (index + 1) * (total - index - 1)
        progress(Progress(Phase.CACHE, index + 1, total, left))
    return scales


class _Seen:
    """Stands where attention looks for a cache, and keeps what it is to hold of each window, by
    head: ``[heads, T, head_dim]``."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See transformers' ``Cache``: takes and gives ``[S, heads, T, head_dim]``."""
        self.keys.append(keys[0].clone())
        self.values.append(values[0].clone())
        return keys, values


def least_loss(numbers: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The scale of each row ``[R, n]`` that stores it with the least squared error: ``[R]``."""
    top = _largest_code(kind)
    largest = numbers.abs().amax(1).clamp(min=MIN_SCALE)
    best = torch.full_like(largest, torch.inf)
    scales = largest / top
    for share in torch.linspace(1, SMALLEST_SHARE, NUM_CANDIDATES).tolist():
        candidate = largest * share / top
        error = round_by(numbers, candidate[:, None], kind).sub_(numbers).square_().sum(1)
        scales = torch.where(error < best, candidate, scales)
        best = torch.minimum(error, best)
    return scales


def round_by(numbers: torch.Tensor, scales: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Numbers stored with scales and read back; what exceeds the largest code becomes it."""
    top = _largest_code(kind)
    codes = (numbers / scales).clamp_(-top, top)
    codes = codes.round_() if kind is Kind.INT else codes.to(torch.float8_e4m3fn).float()
    return codes.mul_(scales)


def _largest_code(kind: Kind) -> float:
    return MAX_INT8 if kind is Kind.INT else MAX_FLOAT8
