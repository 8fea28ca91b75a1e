"""The output head when only its largest logits are wanted."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import load_kernel
from qserve.kernels.output_head import cpu, reference
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.rows import check_rows

__all__ = ["argmax_head", "topk_head"]


Found = tuple[torch.Tensor, torch.Tensor]
"""Ids int64 and logits float32."""


def argmax_head(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    activations: Activations = Activations.FLOAT32,
    out: Found | None = None,
) -> Found:
    """The largest logit of each row: ids int64 ``[M]`` and the logits float32 ``[M]``.

    The logits are those of the product of ``x [M, K]`` with ``weight`` (outputs are the
    vocabulary), to the bit; they are not written to memory. Of equals the lowest id is taken. A NaN
    counts as larger than every number, so a row that overflowed shows. activations: as in the
    product. out: contiguous, written and returned. Raises ``ValueError`` for shapes and
    ``TypeError`` for dtypes that do not fit.
    """
    columns = None if out is None else (out[0].unsqueeze(1), out[1].unsqueeze(1))
    ids, values = topk_head(x, weight, 1, activations=activations, out=columns)
    return ids[:, 0], values[:, 0]


def topk_head(
    x: torch.Tensor,
    weight: PackedWeight,
    k: int,
    *,
    activations: Activations = Activations.FLOAT32,
    out: Found | None = None,
) -> Found:
    """The ``k`` largest logits of each row, largest first: ids int64 ``[M, k]`` and the logits
    float32 ``[M, k]``; see ``argmax_head``. Raises ``ValueError`` also for a ``k`` outside of
    1..vocabulary."""
    check_rows("x", x, weight.in_features)
    if not 1 <= k <= weight.out_features:
        raise ValueError(f"k is {k}, expected 1 to {weight.out_features}, the size of the head")
    if out is not None:
        _check_found(out, (x.shape[0], k))
    if weight.native is not None:
        return cpu.topk_head(x, weight.native, k, activations, out)
    if weight.arrange is not None:
        found: Found = load_kernel("output_head").topk_head(x, weight, k, activations)
    else:
        found = reference.topk_head(x, weight, k, activations)
    if out is None:
        return found
    return out[0].copy_(found[0]), out[1].copy_(found[1])


def _check_found(out: Found, shape: tuple[int, int]) -> None:
    for name, tensor, dtype in zip(
        ("ids", "values"), out, (torch.int64, torch.float32), strict=True
    ):
        if tensor.shape != shape or not tensor.is_contiguous():
            found = tuple(tensor.shape)
            raise ValueError(f"out has {name} of shape {found}, expected contiguous {shape}")
        if tensor.dtype is not dtype:
            raise TypeError(f"out has {name} in {tensor.dtype}, expected {dtype}")
