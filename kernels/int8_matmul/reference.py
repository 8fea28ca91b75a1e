"""The definition of the 8-bit matmul in plain PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations, round_rows


def int8_matmul(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, activations: Activations
) -> None:
    """Writes ``a @ weight.T`` to ``out``; a is ``x``, or ``x`` rounded to int8. weight: dequantized
    float32 ``[N, K]``."""
    rows = round_rows(x) if activations is Activations.INT8 else x.float()
    out.copy_(rows @ weight.T)
