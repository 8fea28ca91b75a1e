"""The native 4-bit matmul: the panel layout and the call."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.native import extension

GROUP_MULTIPLE = 32


class Panels:
    """A weight in the native layout (kernels/csrc/matmul_kernels.h): panels of 16 outputs, each one
    run of memory."""

    __slots__ = ("_run", "nbytes")

    def __init__(self, weight: GroupedWeight) -> None:
        scales = weight.scales.float().contiguous()
        wide = not torch.equal(scales.half().float(), scales)
        native = extension().Int4Weight(
            weight.out_features, weight.in_features, weight.group_size, wide
        )
        self.nbytes: int = native.nbytes
        codes, zero_points = weight.codes.contiguous(), weight.zero_points.contiguous()
        native.pack(codes.data_ptr(), scales.data_ptr(), zero_points.data_ptr())
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
