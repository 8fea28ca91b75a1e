"""The gated activation of Llama's feed-forward layer."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose
from qserve.kernels.rows import check_output, check_rows
from qserve.kernels.silu_mul import cpu, reference

__all__ = ["silu_mul"]


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``y[m, i] = g / (1 + exp(-g)) * u`` with ``g = gate_up[m, i]`` and ``u = gate_up[m, I + i]``
    (SwiGLU, Shazeer 2020)

    gate_up: ``[M, 2 I]`` with contiguous rows. out: ``[M, I]``, written and returned; must not
    overlap ``gate_up``. Raises ``ValueError`` for shapes and ``TypeError`` for dtypes that do not
    fit.
    """
    width = gate_up.shape[-1]
    check_rows("gate_up", gate_up, width)
    if width % 2:
        raise ValueError(f"gate_up has {width} columns, expected an even number: gate and up")
    out = check_output(gate_up, width // 2, out)
    if choose("silu_mul", gate_up.device).backend is Backend.CPU:
        cpu.silu_mul(gate_up, out)
    else:
        reference.silu_mul(gate_up, out)
    return out
