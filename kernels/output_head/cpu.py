"""The native search for the largest logits, in the product with the head."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.native import extension
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.packed_weight import NATIVE_NUMBERS


def topk_head(
    x: torch.Tensor,
    weight: NativeWeight,
    k: int,
    activations: Activations,
    out: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values ``[M, k]`` of the largest outputs of each row, largest first."""
    shape = (x.shape[0], k)
    ids, values = out or (torch.empty(shape, dtype=torch.int64), torch.empty(shape))
    extension().find_largest(
        weight.product,
        x.data_ptr(),
        x.stride()[0],
        x.shape[0],
        NATIVE_NUMBERS[activations],
        k,
        ids.data_ptr(),
        values.data_ptr(),
    )
    return ids, values
