"""The gated activation of a feed-forward layer: SwiGLU and GeGLU."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.gated_activation import cpu, reference
from qserve.kernels.gated_activation.gate import Gate
from qserve.kernels.rows import check_output, check_rows

__all__ = ["Gate", "gated_activation"]


def gated_activation(
    gate_up: torch.Tensor, activation: Gate = Gate.SILU, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``y[m, i] = f(gate_up[m, i]) * gate_up[m, I + i]`` with ``f`` the ``activation``.

    gate_up: ``[M, 2 I]`` with contiguous rows. out: ``[M, I]``, written and returned; must not
    overlap ``gate_up``. Raises ``ValueError`` for shapes and ``TypeError`` for dtypes that do not
    fit.
    """
    width = gate_up.shape[-1]
    check_rows("gate_up", gate_up, width)
    if width % 2:
        raise ValueError(f"gate_up has {width} columns, expected an even number: gate and up")
    out = check_output(gate_up, width // 2, out)
    backend = choose("gated_activation", gate_up.device).backend
    if backend is Backend.CPU:
        cpu.gated_activation(gate_up, activation, out)
    elif backend is Backend.TRITON:
        load_kernel("gated_activation").gated_activation(gate_up, activation, out)
    else:
        reference.gated_activation(gate_up, activation, out)
    return out
