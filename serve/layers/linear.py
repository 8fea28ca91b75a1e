"""A linear layer: picks the op by how its weight is kept."""

from __future__ import annotations

from functools import partial

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend
from qserve.kernels.dense_matmul import DenseWeight, dense_matmul
from qserve.kernels.int4_matmul import Int4Weight, int4_matmul
from qserve.kernels.int8_matmul import Int8Weight, int8_matmul

Weight = Int4Weight | Int8Weight | DenseWeight


class Linear:
    """``y = x W^T + b`` for a weight of any kind.

    Several weights are outputs side by side, ``[y0 | y1 | ...]``: layers of one input whose formats
    differ and that therefore could not be joined into one weight.

    is_native: a call is ``num_parts`` calls of native kernels and nothing else.
    """

    __slots__ = (
        "_bias",
        "_parts",
        "in_features",
        "is_native",
        "nbytes",
        "num_parts",
        "out_features",
    )

    def __init__(
        self,
        weights: list[Weight],
        bias: torch.Tensor | None = None,
        activations: Activations = Activations.FLOAT32,
    ) -> None:
        """bias: float32 ``[out_features]``. activations: input of the quantized matmuls."""
        self.is_native = bias is None and all(w.backend is Backend.CPU for w in weights)
        self.num_parts = len(weights)
        self.in_features = weights[0].in_features
        self.out_features = sum(weight.out_features for weight in weights)
        self.nbytes = sum(weight.nbytes for weight in weights)
        self._bias = bias
        self._parts = []
        start = 0
        for weight in weights:
            if isinstance(weight, Int4Weight):
                op = partial(int4_matmul, weight=weight, activations=activations)
            elif isinstance(weight, Int8Weight):
                op = partial(int8_matmul, weight=weight, activations=activations)
            else:
                op = partial(dense_matmul, weight=weight)
            self._parts.append((op, slice(start, start + weight.out_features)))
            start += weight.out_features

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x: ``[num_tokens, in_features]``. out: ``[num_tokens, out_features]``, written."""
        if len(self._parts) == 1:
            self._parts[0][0](x, out=out)
        else:
            for op, columns in self._parts:
                op(x, out=out[:, columns])
        if self._bias is not None:
            out += self._bias
        return out
