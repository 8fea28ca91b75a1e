"""Whether what a float checkpoint holds can be computed with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from qserve.quant.errors import CheckpointError
from qserve.quant.storage import in_pieces

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def checked(value: torch.Tensor, name: str, shape: tuple[int, ...] | None) -> torch.Tensor:
    """A copy of the tensor in float32: what is read may be the mapped file itself.

    Raises ``CheckpointError`` for a wrong shape, infinity or NaN.
    """
    check(value, name, shape)
    return value.to(torch.float32, copy=True)


def check(value: torch.Tensor, name: str, shape: tuple[int, ...] | None) -> None:
    """Raise ``CheckpointError`` for other than 16-bit or wider floats, a wrong shape, or NaN."""
    if not value.is_floating_point() or value.itemsize == 1:
        raise CheckpointError(
            f"{name} holds {str(value.dtype).removeprefix('torch.')}, and config.json says nothing "
            "of quantization: expected float16, bfloat16 or float32"
        )
    if shape is not None and tuple(value.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {tuple(value.shape)}, config.json implies {shape}: "
            "they are of different models"
        )
    if not all(bool(torch.isfinite(piece).all()) for piece in in_pieces(value)):
        raise CheckpointError(
            f"{name} holds infinite or NaN values: the checkpoint is damaged, fetch it again"
        )


def check_sizes(config: Any, folder: str) -> None:
    """Raise ``CheckpointError`` unless the sizes in transformers' configuration are positive."""
    for name in SIZES:
        if (size := getattr(config, name, 1)) < 1:
            raise CheckpointError(
                f"{folder}: config.json states {name} {size}, expected 1 or more: it is damaged"
            )


def check_block_count(names: Iterable[str], num_blocks: int) -> None:
    """Raise ``CheckpointError`` for a tensor of a block beyond the last that is computed with."""
    beyond = f"model.layers.{num_blocks}."
    for name in names:
        if name.startswith(beyond):
            raise CheckpointError(
                f"the checkpoint holds {name}, and config.json states num_hidden_layers "
                f"{num_blocks}: they are of different models"
            )
