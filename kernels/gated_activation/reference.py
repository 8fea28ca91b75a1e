"""The definition of the gated activations in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional

from qserve.kernels.gated_activation.gate import Gate


def gated_activation(gate_up: torch.Tensor, activation: Gate, out: torch.Tensor) -> None:
    """Writes the activation of the first half of each row times its second half to ``out``."""
    gate, up = gate_up.float().chunk(2, dim=1)
    if activation is Gate.SILU:
        opened = functional.silu(gate)
    else:
        opened = functional.gelu(gate, approximate="none" if activation is Gate.GELU else "tanh")
    out.copy_(opened * up)
