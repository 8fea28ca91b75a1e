"""The native norm of heads."""

from __future__ import annotations

import torch

from qserve.kernels.native import extension


def head_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float, out: torch.Tensor
) -> None:
    """Writes ``x`` with each of its heads normed to ``out``."""
    if weight.dtype is not torch.float32:
        raise TypeError(f"weight is {weight.dtype}, expected float32 on a CPU")
    head_dim = weight.shape[0]
    extension().head_norm(
        x.data_ptr(),
        x.stride()[0],
        weight.data_ptr(),
        eps,
        x.shape[0],
        x.shape[1] // head_dim,
        head_dim,
        weight_offset,
        out.data_ptr(),
        out.stride()[0],
    )
