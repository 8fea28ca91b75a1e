"""A weight of 8-bit floats with scales of any granularity, in neutral form."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """``weight[n, k] = values[n, k] * scales[n // rows, k // columns]``

    values: float8_e4m3fn ``[out_features, in_features]`` (OCP: largest 448, no infinity). scales:
    float32 ``[ceil(out_features / rows), ceil(in_features / columns)]``. block: ``(rows, columns)``
    that share a scale: the whole shape for one scale a tensor, ``(1, in_features)`` for one a
    channel, ``(128, 128)`` for DeepSeek's blocks. Raises ``ValueError`` when the shapes do not
    close and ``TypeError`` for values of another type.
    """

    values: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        if self.values.dtype is not torch.float8_e4m3fn:
            raise TypeError(f"values are {self.values.dtype}, expected torch.float8_e4m3fn")
        rows, columns = self.block
        expected = (-(-self.out_features // rows), -(-self.in_features // columns))
        if self.scales.shape != expected:
            raise ValueError(
                f"scales {tuple(self.scales.shape)} do not fit values {tuple(self.values.shape)} "
                f"in blocks of {rows} x {columns}: expected {expected}"
            )

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The float32 weight ``[out_features, in_features]`` that the values stand for."""
        rows, columns = self.block
        spread = self.scales.float().repeat_interleave(rows, 0)[: self.out_features]
        spread = spread.repeat_interleave(columns, 1)[:, : self.in_features]
        return self.values.float() * spread
