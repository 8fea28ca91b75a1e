"""The native mixture of experts: rows gathered by expert, each weight read once for all of its."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.native import extension
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.packed_weight import NATIVE_NUMBERS


def group(experts: Sequence[NativeWeight]) -> Any:
    """The extension's group of these weights, which it keeps."""
    made = extension().ExpertGroup()
    for expert in experts:
        made.add(expert.product)
    return made


def expert_matmul(
    x: torch.Tensor,
    made: Any,
    expert_ids: torch.Tensor,
    out: torch.Tensor,
    activations: Activations,
) -> None:
    """Writes the products of rows with their experts to ``out``; all were checked."""
    made.run(
        x.data_ptr(),
        x.dim() == 2,
        expert_ids.data_ptr(),
        expert_ids.shape[0],
        expert_ids.shape[1],
        out.data_ptr(),
        out.stride()[1],
        NATIVE_NUMBERS[activations],
    )


def combine_experts(y: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the weighted sums over the experts to ``out``."""
    extension().combine_experts(
        y.data_ptr(), weights.data_ptr(), out.data_ptr(), out.stride()[0], *y.shape
    )


def route_tokens(
    logits: torch.Tensor, renormalize: bool, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Writes the most likely experts of each row to ``ids`` and their weights to ``weights``."""
    extension().route_tokens(
        logits.data_ptr(),
        logits.stride()[0],
        logits.shape[0],
        logits.shape[1],
        ids.shape[1],
        renormalize,
        ids.data_ptr(),
        weights.data_ptr(),
    )
