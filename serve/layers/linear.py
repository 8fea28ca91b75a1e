"""A linear layer: one weight, or several side by side."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.packed_weight import PackedWeight, multiply


class Linear:
    """``y = x W^T + b`` for weights of any kind, which carry their biases.

    Several weights are outputs side by side, ``[y0 | y1 | ...]``: layers of one input whose formats
    differ and that therefore could not be joined into one weight.

    weights: the parts, in order. activations: input of the quantized matmuls.
    """

    __slots__ = (
        "_parts",
        "activations",
        "in_features",
        "nbytes",
        "out_features",
        "weights",
    )

    def __init__(
        self, weights: list[PackedWeight], activations: Activations = Activations.FLOAT32
    ) -> None:
        self.in_features = weights[0].in_features
        self.out_features = sum(weight.out_features for weight in weights)
        self.nbytes = sum(weight.nbytes for weight in weights)
        self.activations = activations
        self.weights = weights
        self._parts = []
        start = 0
        for weight in weights:
            self._parts.append((weight, slice(start, start + weight.out_features)))
            start += weight.out_features

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x: ``[num_tokens, in_features]``. out: ``[num_tokens, out_features]``, written."""
        if len(self._parts) == 1:
            return multiply(x, self._parts[0][0], out=out, activations=self.activations)
        for weight, columns in self._parts:
            multiply(x, weight, out=out[:, columns], activations=self.activations)
        return out
