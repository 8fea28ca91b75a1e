"""What a model makes of the dot products of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Scoring:
    """From dot products to the weights of attention.

    scale: of the dot products. window: positions that a row sees, its own included; None is all
    before it. soft_cap: a score ``s`` becomes ``c * tanh(s / c)`` (Gemma 2, section 2). sinks:
    float32 ``[H]``, a logit of each query head that joins the softmax's denominator and has no
    value (gpt-oss). Raises ``ValueError`` for a window or soft cap that is not positive or sinks of
    another shape and ``TypeError`` for sinks of another dtype.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}: expected at least 1, or None")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap is {self.soft_cap}: expected a positive number, or None")
        if self.sinks is not None:
            if self.sinks.dtype is not torch.float32:
                raise TypeError(f"sinks are {self.sinks.dtype}, expected float32")
            if self.sinks.dim() != 1 or not self.sinks.is_contiguous():
                raise ValueError(f"sinks have shape {tuple(self.sinks.shape)}, expected [heads]")
