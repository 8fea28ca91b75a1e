"""The functions that gate a feed-forward layer."""

from __future__ import annotations

from enum import Enum


class Gate(Enum):
    """What is applied to the gate before it multiplies the other half.

    SILU: ``x / (1 + exp(-x))`` (SwiGLU, Shazeer 2020). GELU: ``x * (1 + erf(x / sqrt(2))) / 2``
    (Hendrycks and Gimpel 2016). GELU_TANH: the approximation of the same paper, which Gemma
    was trained with: ``x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) / 2``.
    """

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
