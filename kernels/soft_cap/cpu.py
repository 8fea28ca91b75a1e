"""The native soft cap."""

from __future__ import annotations

import torch

from qserve.kernels.native import extension


def soft_cap(x: torch.Tensor, cap: float, out: torch.Tensor) -> None:
    """Writes ``cap * tanh(x / cap)`` to ``out``."""
    extension().soft_cap(
        x.data_ptr(),
        x.stride()[0],
        out.data_ptr(),
        out.stride()[0],
        x.shape[0],
        x.shape[1],
        cap,
    )
