"""Products of a mixture of experts: each row with the weights of the experts it is sent to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.expert_matmul import cpu, reference
from qserve.kernels.expert_matmul.launch import suits_tiles
from qserve.kernels.linear_weight import NeutralWeight, prepare_linear, shape_of
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.rows import check_output, check_rows

__all__ = [
    "ExpertWeights",
    "combine_experts",
    "expert_matmul",
    "group_experts",
    "prepare",
    "route_tokens",
]

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """The weights of all experts of one layer, in the layout of the backend that multiplies.

    nbytes: memory the layouts take. layout: what the backend made of the weights.
    """

    num_experts: int
    in_features: int
    out_features: int
    nbytes: int
    backend: Backend
    layout: Any


def prepare(experts: Sequence[NeutralWeight], device: torch.device = CPU) -> ExpertWeights:
    """The weights of one layer's experts, all of one shape and of any format, repacked once for
    fast products on ``device``.

    Raises ``ValueError`` for none and for shapes that differ, and what ``prepare_linear`` raises.
    """
    triton = choose("expert_matmul", device).backend is Backend.TRITON
    if triton and experts and suits_tiles(experts):
        product = load_kernel("expert_matmul").ExpertProduct(experts, device)
        out_features, in_features = shape_of(experts[0])
        return ExpertWeights(
            num_experts=len(experts),
            in_features=in_features,
            out_features=out_features,
            nbytes=product.weight.nbytes,
            backend=Backend.TRITON,
            layout=product,
        )
    return group_experts([prepare_linear(expert, device) for expert in experts])


def group_experts(experts: Sequence[PackedWeight]) -> ExpertWeights:
    """Weights that are packed already, all of one shape, as the experts of one layer."""
    shapes = {(expert.out_features, expert.in_features) for expert in experts}
    if len(shapes) != 1:
        raise ValueError(f"experts have shapes {sorted(shapes)}, expected one for all, and experts")
    out_features, in_features = shapes.pop()
    native = [weight.native for weight in experts if weight.native is not None]
    is_native = len(native) == len(experts)
    return ExpertWeights(
        num_experts=len(experts),
        in_features=in_features,
        out_features=out_features,
        nbytes=sum(weight.nbytes for weight in experts),
        backend=Backend.CPU if is_native else Backend.REFERENCE,
        layout=cpu.group(native) if is_native else tuple(experts),
    )


def expert_matmul(
    x: torch.Tensor,
    experts: ExpertWeights,
    expert_ids: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    activations: Activations = Activations.INT8,
) -> torch.Tensor:
    """``y[m, j, n] = sum_k a[m, k] * W[expert_ids[m, j]][n, k]``; ``a[m, j, k]`` for a 3-D ``x``.

    x: ``[M, K]``, a row for all its experts, or ``[M, top_k, K]``, one for each; contiguous,
    float32 on a CPU. ``a`` is ``x`` or ``x`` rounded, as in ``int4_matmul``. expert_ids: int32
    ``[M, top_k]``, contiguous. out: ``[M, top_k, N]``, written and returned; columns of a wider
    contiguous tensor will do; must not overlap ``x``. A row of the result does not depend on the
    other rows, to the bit: it is that of the product with the expert alone. Raises ``ValueError``
    for shapes and experts that are not there, ``TypeError`` for dtypes that do not fit.
    """
    out = _check(x, experts, expert_ids, out)
    if experts.backend is Backend.TRITON:
        experts.layout.run(x, expert_ids, out, activations)
        return out
    run = cpu.expert_matmul if experts.backend is Backend.CPU else reference.expert_matmul
    run(x, experts.layout, expert_ids, out, activations)
    return out


def combine_experts(
    y: torch.Tensor, weights: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``z[m, h] = sum_j weights[m, j] * y[m, j, h]``, summed in the order of ``j`` in float32.

    y: ``[M, top_k, H]``, contiguous, float32 on a CPU. weights: float32 ``[M, top_k]``, contiguous.
    out: ``[M, H]`` with contiguous rows, written and returned; must not overlap ``y``. Raises
    ``ValueError`` for shapes and ``TypeError`` for dtypes that do not fit.
    """
    if y.dim() != 3 or weights.shape != y.shape[:2]:
        raise ValueError(
            f"y {tuple(y.shape)} does not fit weights {tuple(weights.shape)}: expected "
            "[M, top_k, H] and [M, top_k]"
        )
    _check_dense("y", y)
    out = check_output(y[:, 0], y.shape[2], out)
    if weights.dtype is not torch.float32 or not weights.is_contiguous():
        raise TypeError(f"weights are {weights.dtype}, expected contiguous float32")
    run = cpu.combine_experts if _is_native(y) else reference.combine_experts
    run(y, weights, out)
    return out


def route_tokens(
    logits: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each row: ids int32 ``[M, top_k]``, most likely first (of equals the lowest),
    and their weights float32 ``[M, top_k]``.

    logits: ``[M, num_experts]`` with contiguous rows. Weights are the softmax over all experts;
    with ``renormalize`` those of a row are divided by their sum (Mixtral). out: ids and weights,
    contiguous, written and returned. Raises ``ValueError`` for a ``top_k`` outside of
    1..num_experts and for shapes, ``TypeError`` for dtypes that do not fit.
    """
    check_rows("logits", logits, logits.shape[-1])
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"{top_k} experts are asked for, expected 1 to {logits.shape[1]}")
    shape = (logits.shape[0], top_k)
    ids, weights = (
        out
        if out is not None
        else (
            torch.empty(shape, dtype=torch.int32, device=logits.device),
            torch.empty(shape, device=logits.device),
        )
    )
    if ids.shape != shape or weights.shape != shape:
        raise ValueError(
            f"out has shapes {tuple(ids.shape)} and {tuple(weights.shape)}, expected {shape}"
        )
    if ids.dtype is not torch.int32 or weights.dtype is not torch.float32:
        raise TypeError(f"out is {ids.dtype} and {weights.dtype}, expected int32 and float32")
    run = cpu.route_tokens if _is_native(logits) else reference.route_tokens
    run(logits, renormalize, ids, weights)
    return ids, weights


def _is_native(x: torch.Tensor) -> bool:
    return choose("expert_matmul", x.device).backend is Backend.CPU


def _check(
    x: torch.Tensor, experts: ExpertWeights, expert_ids: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    if expert_ids.dtype is not torch.int32:
        raise TypeError(f"expert_ids are {expert_ids.dtype}, expected int32")
    if expert_ids.dim() != 2 or not expert_ids.is_contiguous():
        raise ValueError(f"expert_ids {tuple(expert_ids.shape)}, expected contiguous [M, top_k]")
    num_rows, top_k = expert_ids.shape
    accepted = ((num_rows, experts.in_features), (num_rows, top_k, experts.in_features))
    if tuple(x.shape) not in accepted:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected {accepted[0]} or {accepted[1]}")
    _check_dense("x", x)
    shape = (num_rows, top_k, experts.out_features)
    if out is None:
        return x.new_empty(shape)
    distance = out.stride(1) if out.dim() == len(shape) else 0
    if out.shape != shape or out.stride() != (top_k * distance, distance, 1):
        raise ValueError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}, expected {shape} with "
            "contiguous rows, all equally far from the next"
        )
    if out.dtype is not x.dtype:
        raise TypeError(f"out is {out.dtype}, expected {x.dtype}")
    return out


def _check_dense(name: str, x: torch.Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}, expected contiguous memory")
    if x.dtype is not torch.float32 and (x.is_cpu or not x.is_floating_point()):
        raise TypeError(f"{name} is {x.dtype}, expected float32 on a CPU, a float elsewhere")
