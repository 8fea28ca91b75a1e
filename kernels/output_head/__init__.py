"""The output head when only its largest logits are wanted."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import load_kernel
from qserve.kernels.output_head import cpu, reference
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.rows import check_rows

__all__ = ["argmax_head", "topk_head"]


def argmax_head(
    x: torch.Tensor, weight: PackedWeight, *, activations: Activations = Activations.FLOAT32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row: ids int64 ``[M]`` and the logits float32 ``[M]``.

    The logits are those of the product of ``x [M, K]`` with ``weight`` (outputs are the
    vocabulary), to the bit; they are not written to memory. Of equals the lowest id is taken. A NaN
    counts as larger than every number, so a row that overflowed shows. activations: as in the
    product. Raises ``ValueError`` for shapes and ``TypeError`` for dtypes that do not fit.
    """
    ids, values = topk_head(x, weight, 1, activations=activations)
    return ids[:, 0], values[:, 0]


def topk_head(
    x: torch.Tensor,
    weight: PackedWeight,
    k: int,
    *,
    activations: Activations = Activations.FLOAT32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest logits of each row, largest first: ids int64 ``[M, k]`` and the logits
    float32 ``[M, k]``; see ``argmax_head``. Raises ``ValueError`` also for a ``k`` outside of
    1..vocabulary."""
    check_rows("x", x, weight.in_features)
    if not 1 <= k <= weight.out_features:
        raise ValueError(f"k is {k}, expected 1 to {weight.out_features}, the size of the head")
    if weight.native is not None:
        return cpu.topk_head(x, weight.native, k, activations)
    if weight.arrange is not None:
        found: tuple[torch.Tensor, torch.Tensor] = load_kernel("output_head").topk_head(
            x, weight, k, activations
        )
        return found
    return reference.topk_head(x, weight, k, activations)
