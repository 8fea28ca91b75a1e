"""Products with a weight kept as plain floats: the definition that every other way is held to."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations, round_activations
from qserve.kernels.backend import Backend
from qserve.kernels.packed_weight import PackedWeight


class ReferenceProduct:
    """``y = round(x[:, order]) @ weight.T + bias`` in float32.

    weight: float32 ``[N, K]``, its columns as they are stored. input_order: int64 ``[K]`` or None,
    the input that each stored column belongs to: activations are rounded in the stored order.
    """

    __slots__ = ("_bias", "_input_order", "_weight")

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        input_order: torch.Tensor | None = None,
    ) -> None:
        device = weight.device
        self._weight = weight
        self._bias = None if bias is None else bias.to(device, torch.float32)
        self._input_order = None if input_order is None else input_order.to(device)

    def run(self, x: torch.Tensor, out: torch.Tensor, activations: Activations) -> None:
        """Writes the product with rows ``x`` to ``out``."""
        if self._input_order is not None:
            x = x[:, self._input_order]
        product = round_activations(x, activations) @ self._weight.T
        out.copy_(product if self._bias is None else product + self._bias)

    def packed(self) -> PackedWeight:
        """This product as a weight."""
        out_features, in_features = self._weight.shape
        return PackedWeight(
            in_features, out_features, self._weight.nbytes, Backend.REFERENCE, self.run
        )
