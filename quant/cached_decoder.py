"""A decoder whose attention reads keys and values as a cache gives them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qserve.quant.cache_scales import KEYS, VALUES, round_by
from qserve.quant.decoder import Block, Decoder
from qserve.quant.formats.checkpoint import Checkpoint

Rounding = Callable[[str, torch.Tensor], torch.Tensor]
"""What a cache makes of keys or values ``[S, heads, T, head_dim]``, given the name of their scales
in a checkpoint."""


class CachedDecoder(Decoder):
    """A decoder that rounds keys and values on their way into attention."""

    def __init__(self, checkpoint: Checkpoint, rounding: Rounding) -> None:
        super().__init__(checkpoint)
        self._rounding = rounding

    def block(self, index: int, length: int) -> Block:
        """See ``Decoder``."""
        block = super().block(index, length)
        block.store_into(_Cache(block, self._rounding))
        return block


def with_stored_scales(checkpoint: Checkpoint) -> Decoder:
    """A decoder that rounds keys and values by the scales of the checkpoint, if it has any.

    This is how engines run it that take stored scales: one for each head, or one for all of them.
    """
    scheme = checkpoint.kv_cache
    if scheme is None:
        return Decoder(checkpoint)
    kind = scheme.kind

    def rounded(name: str, rows: torch.Tensor) -> torch.Tensor:
        return round_by(rows, checkpoint.tensor(name).float().view(-1, 1, 1), kind)

    return CachedDecoder(checkpoint, rounded)


class _Cache:
    """Stands where attention looks for a cache, and gives back what it was given, rounded."""

    def __init__(self, block: Block, rounding: Rounding) -> None:
        self._block = block
        self._rounding = rounding

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See transformers' ``Cache``."""
        pairs = (KEYS, keys), (VALUES, values)
        rounded = [self._rounding(self._block.full_name(name), rows) for name, rows in pairs]
        return rounded[0], rounded[1]
