"""The native gated activations."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from qserve.kernels.gated_activation.gate import Gate
from qserve.kernels.native import extension


def gated_activation(gate_up: torch.Tensor, activation: Gate, out: torch.Tensor) -> None:
    """Writes the activation of the first half of each row times its second half to ``out``."""
    extension().gated_activation(
        gate_up.data_ptr(),
        gate_up.stride()[0],
        out.data_ptr(),
        out.stride()[0],
        gate_up.shape[0],
        out.shape[1],
        _native(activation),
    )


@cache
def _native(activation: Gate) -> Any:
    return getattr(extension().Gate, activation.name)
