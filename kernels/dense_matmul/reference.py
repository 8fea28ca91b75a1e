"""The definition of the matmul with float weights in plain PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend
from qserve.kernels.packed_weight import PackedWeight


def prepare(
    weight: torch.Tensor, device: torch.device, bias: torch.Tensor | None = None
) -> PackedWeight:
    """The product in float32; the weight stays in its own dtype."""
    kept = weight.to(device)
    addend = None if bias is None else bias.to(device, torch.float32)

    def run(x: torch.Tensor, out: torch.Tensor, _: Activations) -> None:
        product = x.float() @ kept.float().T
        out.copy_(product if addend is None else product + addend)

    out_features, in_features = weight.shape
    return PackedWeight(in_features, out_features, kept.nbytes, Backend.REFERENCE, run)
