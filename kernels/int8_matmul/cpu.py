"""The native 8-bit matmul: the panel layout and the call."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.native import extension

GROUP_MULTIPLE = 32


class Panels:
    """A weight in the native layout (kernels/csrc/matmul_kernels.h): panels of 16 outputs, each one
    run of memory."""

    __slots__ = ("_run", "nbytes")

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> None:
        scales = scales.float().contiguous()
        wide = not torch.equal(scales.half().float(), scales)
        native = extension().Int8Weight(codes.shape[0], codes.shape[1], group_size, wide)
        self.nbytes: int = native.nbytes
        codes = codes.contiguous()
        native.pack(codes.data_ptr(), scales.data_ptr())
        self._run = native.run

    def multiply(self, x: torch.Tensor, out: torch.Tensor, activations: Activations) -> None:
        """Writes the product with rows ``x`` to ``out``; both were checked."""
        self._run(
            x.data_ptr(),
            x.stride()[0],
            x.shape[0],
            out.data_ptr(),
            out.stride()[0],
            activations is Activations.INT8,
        )
