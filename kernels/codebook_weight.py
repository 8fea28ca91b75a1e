"""A weight of 4-bit codes into a table of floats (nf4, fp4), in neutral form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CODEBOOK_SIZE = 16


@dataclass(frozen=True, slots=True)
class CodebookWeight:
    """``weight.flatten()[i] = codebook[codes.flatten()[i]] * block_scales[i // block_size]``

    codes: uint8 ``[out_features, in_features]``, values 0..15. codebook: float32 ``[16]``.
    block_scales: float32 ``[ceil(out_features * in_features / block_size)]``, the largest magnitude
    of each block, double quantization already undone. Blocks run through the flattened weight, so
    one may cross from a row to the next where ``in_features`` is no multiple of ``block_size``.
    Raises ``ValueError`` when the shapes do not close.
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    block_scales: torch.Tensor
    block_size: int

    def __post_init__(self) -> None:
        num_blocks = -(-self.codes.numel() // self.block_size)
        if self.codebook.shape != (CODEBOOK_SIZE,) or self.block_scales.shape != (num_blocks,):
            raise ValueError(
                f"codes {tuple(self.codes.shape)} in blocks of {self.block_size} with a codebook "
                f"{tuple(self.codebook.shape)} and scales {tuple(self.block_scales.shape)}: "
                f"expected ({CODEBOOK_SIZE},) and ({num_blocks},)"
            )

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The float32 weight ``[out_features, in_features]`` that the codes stand for."""
        values = self.codebook[self.codes.flatten().long()]
        scales = self.block_scales.repeat_interleave(self.block_size)[: values.numel()]
        return (values * scales).reshape(self.codes.shape)
