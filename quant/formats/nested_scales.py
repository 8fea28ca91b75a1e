"""Scales that are themselves quantized: bitsandbytes' double quantization (arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from qserve.kernels.codebook_weight import CodebookWeight

BLOCK_SIZE = 256
NUM_DECADES = 7
SMALLEST = 1e-38


@dataclass(frozen=True, slots=True)
class NestedScales:
    """``scale[j] = code_map[codes[j]] * scales[j // block_size] + offset``, in float32.

    codes: uint8 ``[n]``. code_map: float32 ``[256]``, rising. scales: float32
    ``[ceil(n / block_size)]``.
    """

    codes: torch.Tensor
    code_map: torch.Tensor
    scales: torch.Tensor
    offset: float
    block_size: int = BLOCK_SIZE

    def dequantize(self) -> torch.Tensor:
        """The scales that the codes stand for: float32 ``[n]``."""
        spread = self.scales.repeat_interleave(self.block_size)[: len(self.codes)]
        return self.code_map[self.codes.long()] * spread + self.offset


@dataclass(frozen=True, slots=True)
class NestedWeight(CodebookWeight):
    """A codebook weight whose ``block_scales`` are those of ``nested``."""

    nested: NestedScales


def nest(scales: torch.Tensor, offset: float | None = None) -> NestedScales:
    """The nearest nested scales to float32 ``[n]``, around an offset: by default their mean."""
    offset = float(scales.mean()) if offset is None else offset
    centred = scales - offset
    blocks = torch.nn.functional.pad(centred, (0, -len(scales) % BLOCK_SIZE))
    blocks = blocks.view(-1, BLOCK_SIZE)
    largest = blocks.abs().amax(1)
    code_map = dynamic_map()
    middles = (code_map[:-1] + code_map[1:]) / 2
    codes = torch.bucketize(blocks / largest.clamp(min=SMALLEST)[:, None], middles)
    return NestedScales(
        codes=codes.to(torch.uint8).flatten()[: len(scales)],
        code_map=code_map,
        scales=largest,
        offset=offset,
    )


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit type, rising: float32.

    0, 1, and of both signs for decade d = 0 .. 6 the middles of 2^d equal parts of 0.1 .. 1, times
    10^(d - 6): the larger the decade, the finer it is divided (arXiv 1511.04561).
    """
    values = [0.0, 1.0]
    for decade in range(NUM_DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10 ** (decade - NUM_DECADES + 1)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))
