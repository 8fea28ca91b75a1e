"""The native gated activation."""

from __future__ import annotations

import torch

from qserve.kernels.native import extension


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Writes silu of the first half of each row times its second half to ``out``."""
    extension().silu_mul(
        gate_up.data_ptr(),
        gate_up.stride()[0],
        out.data_ptr(),
        out.stride()[0],
        gate_up.shape[0],
        out.shape[1],
    )
