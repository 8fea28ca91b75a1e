"""The native matmul with float weights: the panel layout and the call."""

from __future__ import annotations

import torch

from qserve.kernels.native import extension, float_type


class Panels:
    """A weight in the native layout: panels of 16 outputs, ``[panel][k][16]``, in the dtype of the
    weight."""

    __slots__ = ("_run", "nbytes")

    def __init__(self, weight: torch.Tensor) -> None:
        native = extension().DenseWeight(weight.shape[0], weight.shape[1], float_type(weight.dtype))
        self.nbytes: int = native.nbytes
        weight = weight.contiguous()
        native.pack(weight.data_ptr())
        self._run = native.run

    def multiply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the product with rows ``x`` to ``out``; both were checked."""
        self._run(x.data_ptr(), x.stride()[0], x.shape[0], out.data_ptr(), out.stride()[0])
